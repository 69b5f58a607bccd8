"""The folder a conversion writes: begun, found again after an interruption, and refused if it is another's."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsla.convert.adapter import FORMAT, Adapter, load_adapter, read_manifest
from dsla.convert.plan import Plan
from dsla.distill import parallel
from dsla.distill.data import Source, source_files
from dsla.distill.recipe import Recipe
from dsla.errors import AdapterError
from dsla.families import attention_shape
from dsla.mixers import DslaMixer
from dsla.storage import sha256, write_json


def resume(out: Path, plan: Plan, recipe: Recipe, data: Sequence[Source], model: Any) -> dict[int, DslaMixer] | None:
    """The layers an earlier call finished, or None if there was none.

    Training settings may differ from the earlier call's, which bind nothing that is finished; so may the number of layers.

    Args:
        out: the adapter's folder.
        plan: with the recipe's mixer, and the order that is wanted.
        recipe: what is asked for now.
        data: where the training text comes from.
        model: the teacher.

    Raises:
        AdapterError: if `out` holds an adapter of another teacher, mixer, text or order, or is damaged.
    """
    if not (out / "manifest.json").exists():
        return None
    earlier = Plan.load(out / "plan.json")
    common = min(len(earlier.order), len(plan.order))
    if earlier.order[:common] != plan.order[:common]:
        raise AdapterError(f"{out} holds an adapter of another order: choose another --out, or remove it")
    before, now = read_manifest(out).get("made_from"), json.loads(json.dumps(_made_from(recipe, data)))
    if before != now:
        key = next(key for key in now if not isinstance(before, dict) or before.get(key) != now[key])
        raise AdapterError(
            f"{out} holds an adapter made with other settings ({key}): choose another --out, or remove it"
        )
    longer = plan if len(plan.order) > len(earlier.order) else earlier
    _make(out, longer)
    return _load(out, longer, model).mixers


def begin(out: Path, plan: Plan, recipe: Recipe, data: Sequence[Source], model: Any) -> None:
    """Prepares a new folder: the plan, and a manifest without layers.

    Args:
        out: the adapter's folder, created if needed.
        plan: with the recipe's mixer.
        recipe: what is asked for.
        data: where the training text comes from.
        model: the teacher.

    Raises:
        AdapterError: if it cannot be written.
    """
    _make(out, plan)
    manifest = {"format": FORMAT, "layers": {}, "made_from": _made_from(recipe, data), "made_on": made_on(model)}
    try:
        write_json(out / "manifest.json", manifest)
    except OSError as error:
        raise AdapterError(f"cannot write to {out}: {error.strerror or error}") from error


def _load(out: Path, plan: Plan, model: Any) -> Adapter:
    parameter = next(model.parameters())
    return load_adapter(out, attention_shape(model.config), plan.teacher.sha256, parameter.dtype, parameter.device)


def _make(out: Path, plan: Plan) -> None:
    if not parallel.leads():
        return
    try:
        (out / "progress").mkdir(parents=True, exist_ok=True)
        for stale in out.glob(".*.tmp"):
            stale.unlink()
        plan.save(out / "plan.json")
    except OSError as error:
        raise AdapterError(f"cannot write to {out}: {error.strerror or error}") from error


def _made_from(recipe: Recipe, data: Sequence[Source]) -> dict[str, Any]:
    return {
        "mixer": dataclasses.asdict(recipe.mixer),
        "data": dataclasses.asdict(recipe.data),
        "seed": recipe.seed,
        "files": files_read(data),
    }


def files_read(data: Sequence[Source]) -> list[dict[str, Any]]:
    """What the manifest says of the text: every file's name, hash and weight."""
    return [{"name": path.name, "sha256": sha256(path), "weight": weight} for path, weight in source_files(data)]


def made_on(model: Any) -> dict[str, Any]:
    """What the manifest says of where and when training began."""
    parameter = next(model.parameters())
    cuda = parameter.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(parameter.device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
