"""Stages after the chain: all layers trained together, and the result taken only if no level lost by it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsla.convert.adapter import cast, read_manifest, save_stage, stored_weights
from dsla.convert.surgery import Levels
from dsla.distill import parallel
from dsla.distill.data import Source, TrainingText, text_for
from dsla.distill.descent import Meter
from dsla.distill.flops import Costs, mean_level
from dsla.distill.nested import checked_levels, held_out, train_levels, worse_level
from dsla.distill.on_policy import continued
from dsla.distill.output import files_read, made_on
from dsla.distill.part import Part
from dsla.distill.recipe import DataSettings, Recipe, StageSettings
from dsla.distill.trunk import Trunk
from dsla.mixers import DslaMixer
from dsla.ops.shapes import state_dtype

OnStage = Callable[[str, str, int, int, float], None]
"""Called with (stage, `data`, `train` or `check`, done, in all, KL at the highest level or NaN)."""


def stage_record(out: Path, name: str, level: int) -> dict[str, Any] | None:
    """What the manifest says of a stage that was finished with `level` layers; None if it was not."""
    records: list[dict[str, Any]] = read_manifest(out).get("stages", [])
    return next((record for record in records if (record["name"], record["level"]) == (name, level)), None)


def run_stage(
    model: Any,
    levels: Levels,
    text: TrainingText,
    settings: StageSettings,
    seed: int,
    out: Path,
    origin: dict[str, Any],
    part: Part,
    on_step: Callable[[int, int, float], None],
    on_check: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Trains the converted layers together and writes the stage to the adapter, or only its record if a level got worse.

    Args:
        model: the model `levels` belongs to.
        levels: all converted layers; their mixers are changed in place to what the adapter ends up with.
        text: what is trained and measured on.
        settings: optimisation and what is compared.
        seed: of levels drawn and order of batches.
        out: the adapter's folder, with what came before.
        origin: what the record says of where the text came from and what it ran on.
        part: how long this call may take.
        on_step: called with (step, steps, KL at the highest level).
        on_check: called with (batches done, batches in all) while levels are compared.

    Returns:
        The stage's record: settings, tokens, seconds, losses, the levels before and after, and whether it was kept.

    Raises:
        TrainingError: if a loss or gradient is not finite.
        TimeUp: if the time of this call is over.
        AdapterError: if the disk does not take the result.
    """
    trunk, mixers, begun = Trunk(model), levels.mixers, time.monotonic()
    before = {layer: stored_weights(mixer) for layer, mixer in mixers.items()}
    for mixer in mixers.values():
        mixer.to(state_dtype(trunk.dtype)).train().requires_grad_(True)
    checkpoint = out / "progress" / f"{settings.name}.safetensors"
    checkpoint.parent.mkdir(exist_ok=True)
    write_text = continued(model, levels) if settings.on_policy else None
    costs, level = Costs(model, levels.plan.mixer), mean_level(len(mixers))
    tokens = sum(batch.numel() for batch in text.train)
    flops = sum(batch.numel() * costs.stage_step(batch.shape[1], level) for batch in text.train)
    meter = Meter(on_step, tokens, flops)
    losses = train_levels(trunk, levels, text.train, settings, seed, checkpoint, part, meter, write_text)
    after = {layer: stored_weights(mixer) for layer, mixer in mixers.items()}
    checked = checked_levels(len(mixers), settings.checks)
    found = {}
    for turn, (which, weights) in enumerate((("after", after), ("before", before))):
        _take(mixers, weights, trunk.dtype)

        def checking(done: int, total: int, before: int = turn) -> None:
            on_check(before * total + done, 2 * total)

        found[which] = held_out(trunk, levels, text.valid, checked, checking)
    worse = worse_level(found["before"], found["after"], settings.tolerance)
    record = {
        **dataclasses.asdict(settings),
        "level": len(mixers),
        "order": list(levels.plan.order),
        "seed": seed,
        **origin,
        "tokens": tokens,
        "seconds": round(time.monotonic() - begun, 1),
        **meter.speed,
        "before": found["before"],
        "after": found["after"],
        "kept": worse is None,
        "losses": losses,
    }
    if worse is None:
        _take(mixers, after, trunk.dtype)
    if parallel.leads():
        save_stage(out, record, mixers if worse is None else {})
    parallel.wait()
    return record


def train_stages(
    model: Any,
    tokenizer: Any,
    levels: Levels,
    recipe: Recipe,
    sources: Sequence[Source],
    out: Path,
    part: Part | None = None,
    on_progress: OnStage = lambda stage, phase, done, total, kl: None,
) -> list[dict[str, Any]]:
    """Runs the stages of a recipe that an adapter does not have yet, each on text of its own.

    Args:
        model: the model `levels` belongs to.
        tokenizer: its tokenizer.
        levels: all converted layers.
        recipe: its stages, and the seed.
        sources: where the text comes from.
        out: the adapter's folder.
        part: how long this call may take. Default: as long as it needs.
        on_progress: called after every step.

    Returns:
        The records of the stages run.

    Raises:
        DataError: if the text is empty, binary or too short.
        ConfigError: if batches have too few rows for several processes.
        TrainingError: if a loss or gradient is not finite.
        TimeUp: if the time of this call is over.
        AdapterError: if the disk does not take the result.
    """
    records, part = [], part or Part()
    for settings in recipe.stages:
        parallel.check_rows(f"stages, {settings.name}", settings.batch_tokens, settings.seq_len, 2)
    for place, settings in enumerate(recipe.stages):
        name = settings.name
        if stage_record(out, name, len(levels.mixers)) is not None:
            continue
        on_progress(name, "data", 0, 1, math.nan)
        seed = recipe.seed + 1 + place
        data = DataSettings(settings.seq_len, settings.tokens, settings.valid_tokens)
        text = text_for(model, tokenizer, sources, data, settings.batch_tokens, seed)
        origin = {"files": files_read(sources), "made_on": made_on(model)}
        record = run_stage(
            model, levels, text, settings, seed, out, origin, part,
            partial(on_progress, name, "train"), partial(_without_kl, on_progress, name),
        )  # fmt: skip
        records.append(record)
        part.kept(f"stage {name} done")
    return records


def _without_kl(on_progress: OnStage, name: str, done: int, total: int) -> None:
    on_progress(name, "check", done, total, math.nan)


def _take(mixers: dict[int, DslaMixer], weights: dict[int, dict[str, Tensor]], dtype: torch.dtype) -> None:
    for layer, mixer in mixers.items():
        mixer.load_state_dict(weights[layer])
        cast(mixer, dtype).eval().requires_grad_(False)
