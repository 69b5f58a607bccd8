"""How a conversion's progress is shown: speed, error, and the time that is left."""

from __future__ import annotations

from dsla.cli.training import Bars
from dsla.distill.chain import Progress


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
            bars.say(f"layer {progress.layer:>3}  held-out error {progress.error:.4f}  {progress.seconds:.0f} s")
        if progress.phase in ("done", "kept", "data"):
            self._inputs, self._steps_seen = 0.0, 0
            note = "reading the data" if progress.phase == "data" else self._left(progress)
            bars.overall("layers", progress.position, progress.layers, note)
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
        return f"about {_clock(here + whole * layers)} left" if whole is not None else ""


def _rate(progress: Progress) -> str:
    rate = f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.tokens and progress.seconds else ""
    return f"{rate}  error {progress.error:.4f}" if progress.phase == "train" else rate


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
