"""`dsla convert`: a pretrained model's layers to dual-state linear attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from dsla.convert import Plan, Teacher


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
    from dsla.cli.checks import make_folder
    from dsla.cli.progress import ChainProgress
    from dsla.cli.training import Bars, check_length, find_teacher, load_recipe, measured_plan
    from dsla.convert import Plan
    from dsla.convert.adapter import read_manifest
    from dsla.convert.load import check_device, load_model, load_tokenizer
    from dsla.distill import convert as run
    from dsla.distill.chain import training_windows
    from dsla.distill.data import text_files
    from dsla.distill.report import plot_training

    settings = load_recipe(recipe)
    text_files(data)
    check_device(device)
    if plan is not None and plan.is_dir():
        raise PlanError(f"--plan {plan} is a folder: name the plan.json in it")
    kept = out / "plan.json"
    chosen = Plan.load(plan or kept) if plan or kept.is_file() else None
    make_folder(out)
    path, config, teacher = find_teacher(model)
    check_length("data", settings.data.seq_len, config)
    if settings.layers > config.num_hidden_layers:
        raise ConfigError(f"recipe.layers is {settings.layers}, but the model has {config.num_hidden_layers} layers")
    if chosen is None:
        check_length("order", settings.order.seq_len, config)
    else:
        _check_plan(chosen, teacher)
    tokenizer, net = load_tokenizer(path), load_model(path, device=device).requires_grad_(False)
    before = len(read_manifest(out)["layers"])
    with Bars() as bars:
        if chosen is None:
            # Too little text is found before the order is measured; the chain reads it again.
            training_windows(tokenizer, data, settings)
            chosen = measured_plan(net, tokenizer, teacher, settings, data, bars)
            chosen.save(kept)
        run(net, tokenizer, chosen, settings, data, out, ChainProgress(bars))
    finished = len(read_manifest(out)["layers"])
    if finished == before:
        typer.echo(f"All of the {finished} layers were finished before: nothing was trained")
    plot_training(out, out / "training.png")
    typer.echo(f"Wrote {out}: check it with `dsla verify {out}`, use it with --adapter {out}")


def _check_plan(plan: Plan, teacher: Teacher) -> None:
    """Checks that the plan was made for this teacher.

    Raises:
        PlanError: if it was made for another model.
    """
    if plan.teacher.sha256 != teacher.sha256:
        raise PlanError(
            f"the plan was made for {plan.teacher.name} (weights {plan.teacher.sha256[:12]}), "
            f"not for {teacher.name} ({teacher.sha256[:12]})"
        )
