"""`dsla convert`: a pretrained model's layers to dual-state linear attention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.cli.options import Device, Estimate, Minutes, Model, TrainingData
from dsla.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from dsla.convert import Plan, Teacher


def convert(
    data: TrainingData,
    out: Annotated[Path, typer.Option(help="Folder of the adapter. A run that was interrupted goes on from it.")],
    model: Model = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe. Default: the built-in one.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="plan.json of `dsla order`. Default: the order is measured first.")
    ] = None,
    device: Device = "cpu",
    minutes: Minutes = math.inf,
    estimate: Estimate = False,
) -> None:
    """Train an adapter on your text: layer by layer in the plan's order, then all together."""
    from dsla.cli.checks import make_folder
    from dsla.cli.progress import ChainProgress, StageProgress
    from dsla.cli.refine import print_stage
    from dsla.cli.training import (
        Bars,
        begin_training,
        check_length,
        check_stages,
        check_together,
        find_teacher,
        load_recipe,
        measured_plan,
        print_estimate,
        print_stop,
    )
    from dsla.convert import Plan
    from dsla.convert.adapter import read_manifest
    from dsla.convert.load import check_device, load_model, load_tokenizer
    from dsla.distill import convert as run
    from dsla.distill import parallel
    from dsla.distill.chain import training_text
    from dsla.distill.data import Source, check_sources, parse_source
    from dsla.distill.estimate import estimate as estimated
    from dsla.distill.flops import Costs
    from dsla.distill.part import Part, TimeUp
    from dsla.distill.report import plot_training
    from dsla.distill.stages import stage_record
    from dsla.sensitivity.costs import order_flops

    part, settings = Part(minutes), load_recipe(recipe)
    sources = [parse_source(text) for text in data]
    check_sources(sources, settings.data.tokens + settings.data.valid_tokens)
    check_device(device)
    device = begin_training(device)
    if plan is not None and plan.is_dir():
        raise PlanError(f"--plan {plan} is a folder: name the plan.json in it")
    kept = out / "plan.json"
    chosen = Plan.load(plan or kept) if plan or kept.is_file() else None
    check_together(chosen, sources)
    make_folder(out)
    path, config, teacher = find_teacher(model)
    check_length("data", settings.data.seq_len, config)
    check_stages(settings, config)
    if settings.layers > config.num_hidden_layers:
        raise ConfigError(f"recipe.layers is {settings.layers}, but the model has {config.num_hidden_layers} layers")
    if chosen is None:
        check_length("order", settings.order.seq_len, config)
    else:
        _check_plan(chosen, teacher)
    tokenizer, net = load_tokenizer(path), load_model(path, device=device).requires_grad_(False)
    parallel.shard(net)
    before = len(read_manifest(out)["layers"])
    order = chosen.layers(settings.layers or chosen.max_level) if chosen else None
    count = len(order) if order else settings.layers or config.num_hidden_layers
    left = before < count or any(stage_record(out, stage.name, count) is None for stage in settings.stages)
    if left or estimate:
        measuring = 0.0 if chosen else order_flops(Costs(net, settings.mixer), settings.order)
        print_estimate(estimated(net, settings, order, measuring))
    if estimate:
        return
    try:
        with Bars() as bars:
            if chosen is None:
                # Too little text is found before the order is measured; the chain reads it again.
                there = [source for source in sources if isinstance(source, Source)]
                if len(there) == len(sources):
                    training_text(net, tokenizer, there, settings)
                chosen = measured_plan(net, tokenizer, teacher, settings, sources, out / "progress", bars, part=part)
                chosen.save(kept)
            progress, stages = ChainProgress(bars), StageProgress(bars)
            records = run(net, tokenizer, chosen, settings, sources, out, progress, stages, part)
    except TimeUp as stop:
        print_stop(minutes, f"{len(read_manifest(out)['layers'])} of {count} layers are finished; {stop}")
        return
    finished = len(read_manifest(out)["layers"])
    if finished == before and not records:
        typer.echo(f"All of the {finished} layers were finished before: nothing was trained")
    for record in records:
        print_stage(record)
    if parallel.leads():
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
