"""`dsla convert`: a pretrained model's layers to dual-state linear attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsla.errors import PlanError

if TYPE_CHECKING:
    from dsla.cli.training import Bars
    from dsla.convert import Plan, Teacher
    from dsla.distill.chain import Progress


def convert(
    data: Annotated[
        list[Path], typer.Option(help="Training text: .txt or .jsonl, .gz or .zst, or a folder; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the adapter. A run that was interrupted goes on from it.")],
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe. Default: the built-in one.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="plan.json of `dsla order`. Default: the order is measured first.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Train an adapter, layer by layer in the plan's order, on your text."""
    from dsla.cli.training import Bars, load_recipe, load_teacher, measured_plan
    from dsla.convert import Plan
    from dsla.distill import convert as run
    from dsla.distill.report import plot_training

    settings = load_recipe(recipe)
    net, tokenizer, teacher = load_teacher(model, device)
    with Bars() as bars:
        if plan is not None:
            chosen = Plan.load(plan)
        elif (out / "plan.json").exists():
            chosen = Plan.load(out / "plan.json")
        else:
            chosen = measured_plan(net, tokenizer, teacher, settings, data, bars)
        run(net, tokenizer, _belonging(chosen, teacher), settings, data, out, _Show(bars))
    plot_training(out, out / "training.png")
    typer.echo(f"Wrote {out}: check it with `dsla verify {out}`, use it with --adapter {out}")


def _belonging(plan: Plan, teacher: Teacher) -> Plan:
    """The plan, if it was made for this teacher.

    Raises:
        PlanError: if it was made for another model.
    """
    if plan.teacher.sha256 != teacher.sha256:
        raise PlanError(
            f"the plan was made for {plan.teacher.name} (weights {plan.teacher.sha256[:12]}), "
            f"not for {teacher.name} ({teacher.sha256[:12]})"
        )
    return plan


class _Show:
    """Progress of the chain as two bars: all layers, and the one in hand."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._seconds: list[float] = []

    def __call__(self, progress: Progress) -> None:
        bars, left = self._bars, progress.layers - progress.position
        if progress.phase in ("done", "kept"):
            if progress.phase == "done":
                self._seconds.append(progress.seconds)
                bars.say(f"layer {progress.layer:>3}  held-out error {progress.error:.4f}  {progress.seconds:.0f} s")
            eta = _clock(sum(self._seconds) / len(self._seconds) * left) if self._seconds else "?"
            bars.update("layers", progress.position, progress.layers, f"about {eta} left")
        elif progress.phase == "data":
            bars.update("layers", progress.position, progress.layers, "reading the data")
        else:
            bars.update(f"{progress.phase}, layer {progress.layer}", progress.step, progress.steps, _rate(progress))


def _rate(progress: Any) -> str:
    rate = f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.tokens and progress.seconds else ""
    return f"{rate}  error {progress.error:.4f}" if progress.phase == "train" else rate


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
