"""`dsla refine`: the layers of an adapter trained together, on your text."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from dsla.cli.options import Device, Estimate, Minutes, Model, TrainingData
from dsla.errors import AdapterError, ConfigError


def refine(
    data: TrainingData,
    recipe: Annotated[Path, typer.Option(help="YAML recipe; its stages and seed count.")],
    out: Annotated[Path, typer.Option(help="Folder of the new adapter. A run that was interrupted goes on from it.")],
    model: Model = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to start from. Default: the shipped one of the model.")
    ] = None,
    device: Device = "cpu",
    minutes: Minutes = math.inf,
    estimate: Estimate = False,
) -> None:
    """Train all layers of an adapter together against the teacher, at levels drawn anew each step."""
    from dsla.cli.checks import make_folder
    from dsla.cli.progress import StageProgress
    from dsla.cli.training import (
        Bars,
        begin_training,
        check_stages,
        check_together,
        find_teacher,
        load_recipe,
        print_estimate,
        print_stop,
        writing,
    )
    from dsla.convert import find_adapter
    from dsla.convert.load import check_device, load_model, load_tokenizer
    from dsla.convert.reorder import copy_adapter
    from dsla.convert.surgery import Levels
    from dsla.distill import parallel
    from dsla.distill.data import check_sources, check_tokenizer, parse_source
    from dsla.distill.data.teacher import teacher_sources
    from dsla.distill.estimate import estimate as estimated
    from dsla.distill.part import Part, TimeUp
    from dsla.distill.stages import stage_record, train_stages

    part, settings = Part(minutes), load_recipe(recipe)
    if not settings.stages:
        raise ConfigError(f"{recipe} names no stages: add at least one under 'stages'")
    sources = [parse_source(text) for text in data]
    check_sources(sources, max(stage.tokens + stage.valid_tokens for stage in settings.stages))
    check_device(device)
    device = begin_training(device)
    make_folder(out)
    path, config, _ = find_teacher(model)
    check_stages(settings, config)
    begun = parallel.agreed((out / "manifest.json").exists())
    found = find_adapter(path, config, out if begun else adapter, config.dtype, device)
    if found is None:
        raise AdapterError(
            "no adapter is shipped for this model: name one with --adapter, or make one with `dsla convert`"
        )
    check_together(found.plan, sources)
    tokenizer, net = load_tokenizer(path), load_model(path, device=device).requires_grad_(False)
    check_tokenizer(tokenizer, net)
    parallel.shard(net)
    if estimate or any(stage_record(out, stage.name, found.max_level) is None for stage in settings.stages):
        as_trained = dataclasses.replace(settings, mixer=found.plan.mixer)
        print_estimate(estimated(net, as_trained, found.plan.layers(found.max_level), chain=False))
    if estimate:
        return
    if not begun and parallel.leads():
        copy_adapter(found, out)
    parallel.wait()
    try:
        with Bars() as bars:
            longest = max(stage.seq_len for stage in settings.stages)
            files = teacher_sources(sources, net, tokenizer, longest, settings.seed, out, writing(bars, part))
            levels = Levels(net, found.plan, found.mixers)
            records = train_stages(net, tokenizer, levels, settings, files, out, part, StageProgress(bars))
    except TimeUp as stop:
        print_stop(minutes, str(stop))
        return
    if parallel.leads():
        shutil.rmtree(out / "progress", ignore_errors=True)
    for record in records:
        print_stage(record)
    if not records:
        typer.echo("All stages were finished before: nothing was trained")
    typer.echo(f"Wrote {out}: check it with `dsla verify {out}`, use it with --adapter {out}")


def print_stage(record: dict[str, Any]) -> None:
    """Shows what a stage did to the levels on held-out text."""
    from rich.console import Console
    from rich.table import Table

    from dsla.cli.progress import speed

    teacher = record["before"][0]["perplexity"]
    what = "kept" if record["kept"] else "dropped: a level got worse, the weights from before stay"
    table = Table(title=f"stage {record['name']}, held-out text: {what}", caption=speed(record).strip() or None)
    for name in ("level", "perplexity before", "after", "KL before", "after"):
        table.add_column(name, justify="right")
    for level, before in record["before"].items():
        after = record["after"][level]
        ratios = (f"{side['perplexity'] / teacher:.4f}x" for side in (before, after))
        table.add_row(str(level), *ratios, *(f"{side['kl']:.4f}" for side in (before, after)))
    Console().print(table)
