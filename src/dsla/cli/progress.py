"""How the progress of a conversion and of an evaluation is shown: speed, error, and the time that is left."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dsla.cli.training import Bars, TimeLeft, clock
from dsla.distill.chain import Progress
from dsla.distill.data.teacher import NAME
from dsla.evals.runner import Progress as EvaluationProgress


class ChainProgress:
    """Shows the chain as two bars, all layers and the one in hand, or as lines that say both.

    Args:
        bars: where.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._finished: list[float] = []
        self._inputs = 0.0
        self._steps_seen = 0

    def __call__(self, progress: Progress) -> None:
        bars = self._bars
        if progress.phase == "done":
            self._finished.append(progress.seconds)
            held_out = f"held-out error {progress.error:.4f}"
            bars.say(f"layer {progress.layer:>3}  {held_out}  {progress.seconds:.0f} s{speed(progress.speed)}")
        if progress.phase in ("done", "kept", "data"):
            self._inputs, self._steps_seen = 0.0, 0
            note = "reading the data" if progress.phase == "data" else self._left(progress)
            bars.overall("layers", progress.position, progress.layers, note)
            return
        if progress.phase == "text":
            bars.update(NAME, progress.step, progress.steps, _rate(progress))
            return
        if progress.phase == "inputs":
            self._inputs = progress.seconds
        else:
            self._steps_seen += 1
        bars.overall("layers", progress.position, progress.layers, self._left(progress))
        bars.update(f"{progress.phase}, layer {progress.layer}", progress.step, progress.steps, _rate(progress))

    def _left(self, progress: Progress) -> str:
        """Time left, from the layers finished so far, or before there is one from the steps of the first."""
        layers = progress.layers - progress.position
        here, whole = 0.0, sum(self._finished) / len(self._finished) if self._finished else None
        if progress.phase == "train":
            a_step = progress.seconds / self._steps_seen
            here, layers = a_step * (progress.steps - progress.step), layers - 1
            whole = whole or self._inputs + a_step * progress.steps
        elif whole is not None and progress.phase == "inputs":
            here = -min(progress.seconds, whole)
        return f"about {clock(here + whole * layers)} left" if whole is not None else ""


class EvalProgress:
    """Shows an evaluation as two bars, all items and those of the task in hand, or as lines that say both.

    Args:
        bars: where.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def __call__(self, progress: EvaluationProgress) -> None:
        left = f"about {clock(progress.seconds_left)} left"
        self._bars.overall("items", progress.done, progress.total, left)
        name = f"{progress.task.name}, {progress.setting}"
        self._bars.update(name, progress.task_done, progress.task.items)


class StageProgress:
    """Shows the training of all layers together: a bar for the part in hand, with the time that is left.

    Args:
        bars: where.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._left = defaultdict[str, TimeLeft](TimeLeft)

    def __call__(self, stage: str, phase: str, done: int, total: int, kl: float) -> None:
        if phase == "data":
            self._bars.say(f"stage {stage}: reading the data")
            return
        name = f"{stage}, {phase}"
        note = self._left[name](done, total)
        self._bars.update(name, done, total, f"{note}  KL {kl:.4f}" if phase == "train" else note)


def speed(found: dict[str, Any]) -> str:
    """`tokens_per_second` and `flop_per_second` of a manifest's entry in words, if it has them."""
    if "flop_per_second" not in found:
        return ""
    return f"  {found['tokens_per_second']:,.0f} tokens/s  {found['flop_per_second']:.2e} FLOP/s"


def _rate(progress: Progress) -> str:
    rate = f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.tokens and progress.seconds else ""
    return f"{rate}  error {progress.error:.4f}" if progress.phase == "train" else rate
