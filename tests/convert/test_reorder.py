"""Adapters in another order: a folder is a whole adapter or none, and never takes another's place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsla.convert import Plan, Teacher, load_adapter
from dsla.convert.adapter import Adapter, read_manifest, save_layer, save_stage
from dsla.convert.reorder import check_reorder, reorder
from dsla.errors import AdapterError, PlanError
from dsla.mixers import AttentionShape, DslaConfig, DslaMixer

SHAPE = AttentionShape(hidden_size=24, n_heads=4, n_kv_heads=2, head_dim=6)
CONFIG = DslaConfig(window=4, sinks=2, delta_rank=3)
PLAN = Plan(Teacher("tiny", "0" * 64, 3), (2, 0, 1), CONFIG, "kl", {"kl": (2.0, 3.0, 1.0)})
NEW = dataclasses.replace(PLAN, order=(0, 1, 2), metric="greedy_trained", scores={"greedy_trained": (1.0, 2.0, 3.0)})


def load(folder: Path) -> Adapter:
    return load_adapter(folder, SHAPE, "0" * 64, torch.float32)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    folder = tmp_path / "old"
    folder.mkdir()
    PLAN.save(folder / "plan.json")
    for position, layer in enumerate(PLAN.order):
        save_layer(folder, layer, DslaMixer(CONFIG, SHAPE), {"position": position})
    save_stage(folder, {"name": "nested"}, {0: DslaMixer(CONFIG, SHAPE)})
    (tmp_path / "new").mkdir()
    return load(folder)


def test_weights_stay_and_the_order_changes(adapter: Adapter, tmp_path: Path) -> None:
    reorder(adapter, NEW, tmp_path / "new")
    found = load(tmp_path / "new")
    assert list(found.mixers) == [0, 1, 2] and found.plan == NEW
    for layer, mixer in adapter.mixers.items():
        for name, weight in mixer.state_dict().items():
            assert torch.equal(found.mixers[layer].state_dict()[name], weight)
    entries = read_manifest(tmp_path / "new")["layers"]
    assert [(entry["position"], entry["trained_at"]) for entry in entries.values()] == [(0, 1), (1, 2), (2, 0)]
    assert list(load(adapter.path).mixers) == [2, 0, 1], "the old one is as it was"

    (tmp_path / "newer").mkdir()
    reorder(found, dataclasses.replace(NEW, order=(1, 2, 0)), tmp_path / "newer")
    entries = read_manifest(tmp_path / "newer")["layers"]
    assert {layer: entry["trained_at"] for layer, entry in entries.items()} == {"2": 0, "0": 1, "1": 2}


def test_what_was_interrupted_is_no_adapter_and_is_done_again(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dsla.convert.reorder.write_json", full)
        with pytest.raises(AdapterError, match="cannot write to .*new: No space left"):
            reorder(adapter, NEW, tmp_path / "new")
    with pytest.raises(AdapterError, match=r"no manifest\.json"):
        load(tmp_path / "new")
    reorder(adapter, NEW, tmp_path / "new")
    assert load(tmp_path / "new").max_level == 3


def test_other_adapters_and_plans_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="holds an adapter already"):
        reorder(adapter, NEW, adapter.path)
    other = dataclasses.replace(NEW, mixer=dataclasses.replace(CONFIG, window=8))
    for plan in (other, dataclasses.replace(NEW, order=(0, 1))):
        with pytest.raises(PlanError, match="does not order the layers"):
            reorder(adapter, plan, tmp_path / "new")
    partial = dataclasses.replace(adapter, mixers={2: adapter.mixers[2]})
    with pytest.raises(AdapterError, match="holds 1 of 3 layers"):
        check_reorder(partial, tmp_path / "new")
