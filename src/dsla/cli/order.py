"""`dsla order`: which layers mind conversion least."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def order(
    data: Annotated[
        list[Path], typer.Option(help="Text to measure on: .txt or .jsonl, .gz or .zst, or a folder; repeatable.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for plan.json and sensitivity.png.")] = Path("plan"),
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe; its order and mixer settings count.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Score every layer by measured KL and by attention entropy, and write a plan."""
    from rich.console import Console
    from rich.table import Table

    from dsla.cli.checks import make_folder
    from dsla.cli.training import Bars, check_length, find_teacher, load_recipe, measured_plan
    from dsla.convert.load import check_device, load_model, load_tokenizer
    from dsla.distill.data import text_files
    from dsla.sensitivity import plot_scores

    settings = load_recipe(recipe)
    text_files(data)
    check_device(device)
    make_folder(out)
    path, config, teacher = find_teacher(model)
    check_length("order", settings.order.seq_len, config)
    tokenizer, net = load_tokenizer(path), load_model(path, device=device).requires_grad_(False)
    with Bars() as bars:
        plan = measured_plan(net, tokenizer, teacher, settings, data, bars)
    plan.save(out / "plan.json")
    plot_scores(plan, out / "sensitivity.png")

    table = Table(title=f"{teacher.name}: layers by {plan.metric}, least sensitive first")
    table.add_column("place", justify="right")
    table.add_column("layer", justify="right")
    for metric in plan.scores:
        table.add_column(f"{metric} (nats)", justify="right")
    for place, layer in enumerate(plan.order, 1):
        table.add_row(str(place), str(layer), *(f"{scores[layer]:.5f}" for scores in plan.scores.values()))
    console = Console()
    console.print(table)
    console.print(f"Wrote {out / 'plan.json'} and {out / 'sensitivity.png'}")
