"""`dsla order`: which layers mind conversion least."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.cli.options import Device, MeasuredData, Model

if TYPE_CHECKING:
    from dsla.convert import Plan


def order(
    data: MeasuredData,
    model: Model = None,
    out: Annotated[
        Path, typer.Option(help="Folder for plan.json and sensitivity.png. An interrupted search goes on from it.")
    ] = Path("plan"),
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe; its order and mixer settings count.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What orders: kl, kl_worst, greedy, greedy_worst, entropy, outliers, retrieval, random. Default: the recipe's."
        ),
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="Another metric to record; repeatable.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Measure with this adapter's trained layers, and write it to --out in the new order."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Score every layer, write a plan that orders them, or an adapter in a new order."""
    import torch

    from dsla.cli.checks import make_folder
    from dsla.cli.training import Bars, check_length, find_teacher, load_recipe, measured_plan
    from dsla.convert import load_adapter
    from dsla.convert.load import check_device, load_model, load_tokenizer
    from dsla.convert.reorder import check_reorder, reorder
    from dsla.distill.data import check_sources, parse_source
    from dsla.families import attention_shape
    from dsla.sensitivity import plot_scores

    settings = load_recipe(recipe)
    asked = dataclasses.replace(
        settings.order, metric=metric or settings.order.metric, also=tuple(also or settings.order.also)
    )
    settings = dataclasses.replace(settings, order=asked)
    sources = [parse_source(text) for text in data]
    check_sources(sources)
    check_device(device)
    make_folder(out)
    path, config, teacher = find_teacher(model)
    check_length("order", settings.order.seq_len, config)
    found = None
    if adapter is not None:
        dtype = config.dtype or torch.float32
        found = load_adapter(adapter, attention_shape(config), teacher.sha256, dtype, device)
        check_reorder(found, out)
        settings, teacher = dataclasses.replace(settings, mixer=found.plan.mixer), found.plan.teacher
    tokenizer, net = load_tokenizer(path), load_model(path, device=device).requires_grad_(False)
    with Bars() as bars:
        trained = found.mixers if found else None
        plan = measured_plan(net, tokenizer, teacher, settings, sources, out / "progress", bars, trained)
    if found is None:
        plan.save(out / "plan.json")
    else:
        reorder(found, plan, out)
    plot_scores(plan, out / "sensitivity.png")
    shutil.rmtree(out / "progress", ignore_errors=True)
    _print(plan, out, adapter)


def _print(plan: Plan, out: Path, adapter: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from dsla.sensitivity import label

    table = Table(title=f"{plan.teacher.name}: layers by {plan.metric}, least sensitive first")
    table.add_column("place", justify="right")
    table.add_column("layer", justify="right")
    for metric in plan.scores:
        table.add_column(metric, justify="right")
    for place, layer in enumerate(plan.order, 1):
        table.add_row(str(place), str(layer), *(f"{scores[layer]:.5f}" for scores in plan.scores.values()))
    console = Console()
    console.print(table)
    for metric in plan.scores:
        console.print(f"{metric}: {label(metric)}", highlight=False)
    written = f"{adapter} in this order to {out}" if adapter else f"{out / 'plan.json'} and {out / 'sensitivity.png'}"
    console.print(f"Wrote {written}")
