"""The bars the project has set itself, held against the committed results and the shipped adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import dsla
from dsla.convert import find_adapter, read_config

ROOT = Path(__file__).parents[1]
SHIPPED = Path(dsla.__file__).parent / "adapters" / "smollm2-135m-instruct"
LEVELS = json.loads((ROOT / "benchmarks" / "results" / "levels.json").read_text(encoding="utf-8"))
ROWS = {row["level"]: row for row in LEVELS["rows"]}


def test_half_of_the_layers_keep_the_quality() -> None:
    assert ROWS[15]["wikitext2_1k"] <= 1.06 * ROWS[0]["wikitext2_1k"]


@pytest.mark.parametrize("text", ["wikitext2_1k", "books_4k"])
@pytest.mark.parametrize("level", [8, 15, 23, 30])
def test_states_beat_window_and_sinks_alone(level: int, text: str) -> None:
    """Better than the same layers untrained without states, and than the adapter with its states left out."""
    assert ROWS[level][text] < ROWS[level][f"{text}_floor"]
    assert ROWS[level][text] < ROWS[level][f"{text}_states_off"]


@pytest.mark.parametrize(("level", "floor"), [(15, 17.45), (23, 19.63), (30, 29.16)])
def test_adapter_beats_the_floor_measured_before_there_was_one(level: int, floor: float) -> None:
    assert ROWS[level]["wikitext2_1k"] < floor


def test_results_belong_to_the_shipped_adapter() -> None:
    files = sorted(SHIPPED.glob("layer-*.safetensors"))
    assert LEVELS["adapter_layers"] == len(files) >= 15
    layers = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))["layers"]
    hashes = "".join(entry["sha256"] for entry in layers.values())
    assert LEVELS["adapter_sha256"] == hashlib.sha256(hashes.encode()).hexdigest(), "run benchmarks/levels.py"


def test_adapter_is_small_on_disk() -> None:
    plan = json.loads((SHIPPED / "plan.json").read_text(encoding="utf-8"))
    assert plan["mixer"]["window"] <= 64 and plan["mixer"]["sinks"] <= 4
    per_layer = max(file.stat().st_size for file in SHIPPED.glob("layer-*.safetensors"))
    assert 30 * per_layer <= 16 * 2**20


@pytest.mark.model
def test_all_levels_resident_cost_little(default_model: Path) -> None:
    adapter = find_adapter(default_model, read_config(default_model), None, torch.bfloat16)
    assert adapter is not None
    teacher = sum(file.stat().st_size for file in default_model.glob("*.safetensors"))
    assert teacher + adapter.nbytes * 30 / adapter.max_level <= 1.08 * teacher
