"""Training all levels together: it lowers the divergence, resumes exactly, and is refused where a level got worse."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsla.convert import load_adapter
from dsla.convert.adapter import read_manifest, save_layer
from dsla.convert.surgery import Levels
from dsla.distill.data import Source, TrainingText
from dsla.distill.nested import checked_levels, held_out, train_levels, worse_level
from dsla.distill.on_policy import continued
from dsla.distill.output import begin
from dsla.distill.part import Part
from dsla.distill.recipe import StageSettings
from dsla.distill.stages import run_stage, stage_record
from dsla.distill.trunk import Trunk
from dsla.errors import AdapterError, TrainingError
from dsla.families import attention_shape
from dsla.mixers import DslaMixer
from tests.distill.tiny import PLAN, RECIPE, TEACHER, teacher

SETTINGS = StageSettings(tokens=1024, seq_len=32, batch_tokens=64, valid_tokens=128, lr=0.01, checks=3)


@functools.cache
def batches(count: int, seed: int) -> list[torch.Tensor]:
    """Text of the teacher's own, on which it is the best model there is."""
    torch.manual_seed(seed)
    start = torch.randint(0, 128, (2 * count, 1))
    text = teacher().generate(start, do_sample=True, top_k=0, min_new_tokens=31, max_new_tokens=31, pad_token_id=0)
    return list(text.view(count, 2, 32))


def fresh() -> tuple[Trunk, Levels]:
    model = teacher()
    torch.manual_seed(4)
    mixers = {layer: DslaMixer(RECIPE.mixer, attention_shape(model.config)) for layer in PLAN.order}
    plan = dataclasses.replace(PLAN, mixer=RECIPE.mixer)
    return Trunk(model), Levels(model, plan, mixers)


def run(
    trunk: Trunk, levels: Levels, path: Path, settings: StageSettings = SETTINGS, seconds: float = 60.0
) -> list[float]:
    part = Part(checkpoint_seconds=seconds)
    return train_levels(trunk, levels, batches(24, 1), settings, 3, path, part, lambda step, steps, loss: None)


def test_divergence_falls_at_every_level(tmp_path: Path) -> None:
    trunk, levels = fresh()
    text = batches(2, 2)
    before = held_out(trunk, levels, text, (1, 2, 3))
    losses = train_levels(
        trunk, levels, text * 40, SETTINGS, 3, tmp_path / "checkpoint", Part(), lambda step, steps, loss: None
    )
    after = held_out(trunk, levels, text, (1, 2, 3))
    assert len(losses) == 80 and before[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(after[level]["kl"] < 0.97 * before[level]["kl"] for level in (1, 2, 3)), (before, after)
    assert after[0] == before[0], "level 0 is the teacher"


@torch.no_grad()
def test_held_out_is_the_models_own_divergence() -> None:
    trunk, levels = fresh()
    levels.set(2)
    (batch,) = batches(1, 2)
    nll, kl = [], []
    for row in batch:
        model = teacher()
        expected = model(row[None]).logits[0].log_softmax(-1)
        mine = copy.deepcopy(levels)
        found = mine_logits(model, mine.mixers, row)
        nll.append(F.nll_loss(found[:-1], row[1:]))
        kl.append(F.kl_div(found[:-1], expected[:-1], log_target=True, reduction="none").sum(-1).mean())
    result = held_out(trunk, levels, [batch], (2,))[2]
    assert result["perplexity"] == pytest.approx(math.exp(float(sum(nll)) / 2), rel=1e-4)
    assert result["kl"] == pytest.approx(float(sum(kl)) / 2, rel=1e-3)


def mine_logits(model: torch.nn.Module, mixers: dict[int, DslaMixer], row: torch.Tensor) -> torch.Tensor:
    Levels(model, dataclasses.replace(PLAN, mixer=RECIPE.mixer), mixers).set(2)
    return model(row[None]).logits[0].log_softmax(-1)


@pytest.mark.parametrize("stop", [1, 7, 23])
def test_resumed_run_ends_in_the_same_weights(tmp_path: Path, stop: int) -> None:
    trunk, levels = fresh()
    whole = run(trunk, levels, tmp_path / "whole")
    expected = {name: p.clone() for m in levels.mixers.values() for name, p in m.named_parameters()}

    class Killed(Exception):
        pass

    def kill(step: int, steps: int, loss: float) -> None:
        if step == stop:
            raise Killed

    trunk, levels = fresh()
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train_levels(trunk, levels, batches(24, 1), SETTINGS, 3, path, Part(checkpoint_seconds=0.0), kill)
    trunk, levels = fresh()
    assert run(trunk, levels, path) == whole
    for mixer in levels.mixers.values():
        for name, p in mixer.named_parameters():
            if mixer is levels.mixers[PLAN.order[-1]]:
                assert torch.equal(p, expected[name]), name


def test_loss_that_is_not_finite_stops_with_its_step(tmp_path: Path) -> None:
    trunk, levels = fresh()
    with torch.no_grad():
        levels.mixers[2].o_delta.up.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"loss at level 3 is nan at stage nested, step 0 of 24"):
        run(trunk, levels, tmp_path / "checkpoint")


def test_levels_compared() -> None:
    assert checked_levels(30, 8) == (4, 8, 11, 15, 19, 22, 26, 30)
    assert checked_levels(3, 8) == (1, 2, 3)
    before = {level: {"perplexity": 10.0} for level in (1, 2, 3)}
    after = {1: {"perplexity": 10.04}, 2: {"perplexity": 10.06}, 3: {"perplexity": 9.0}}
    assert worse_level(before, after, 0.005) == 2
    assert worse_level(before, after, 0.01) is None


def a_text(folder: Path) -> Source:
    (folder / "text.txt").write_text("some text")
    return Source(folder / "text.txt")


def conversion(out: Path, **changes: float) -> tuple[dict[str, object], Levels, Trunk]:
    trunk, levels = fresh()
    model = teacher()
    levels = Levels(model, levels.plan, levels.mixers)
    begin(out, levels.plan, RECIPE, [a_text(out)], model)
    for position, layer in enumerate(PLAN.order):
        save_layer(out, layer, levels.mixers[layer], {"position": position})
    settings = dataclasses.replace(SETTINGS, **changes)
    text = TrainingText(batches(2, 2) * 30, batches(2, 2))
    record = run_stage(model, levels, text, settings, 3, out, {"files": []}, Part(), lambda step, steps, kl: None)
    return record, levels, trunk


def test_stage_replaces_the_chains_weights(tmp_path: Path) -> None:
    record, levels, _ = conversion(tmp_path)
    assert record["kept"] and stage_record(tmp_path, "nested", 3) is not None
    assert stage_record(tmp_path, "nested", 2) is None and stage_record(tmp_path, "long", 3) is None
    files = sorted(file.name for file in tmp_path.glob("layer-*"))
    assert files == ["layer-00.nested.safetensors", "layer-01.nested.safetensors", "layer-02.nested.safetensors"]
    (tmp_path / "progress" / "nested.safetensors").unlink()
    (tmp_path / "progress").rmdir()
    adapter = load_adapter(tmp_path, attention_shape(teacher().config), TEACHER.sha256, torch.float32)
    for layer, mixer in adapter.mixers.items():
        for name, p in mixer.named_parameters():
            assert torch.equal(p, levels.mixers[layer].get_parameter(name))


def test_stage_that_harms_a_level_is_recorded_and_dropped(tmp_path: Path) -> None:
    record, levels, _ = conversion(tmp_path, lr=0.1, tolerance=0.0)
    assert not record["kept"] and read_manifest(tmp_path)["stages"][0]["kept"] is False
    assert sorted(file.name for file in tmp_path.glob("layer-*"))[0] == "layer-00.safetensors"
    _, untrained = fresh()
    for layer, mixer in levels.mixers.items():
        for name, p in mixer.named_parameters():
            expected = untrained.mixers[layer].get_parameter(name)
            assert torch.allclose(p, expected, rtol=1e-2, atol=1e-3), "weights from before, as stored"


def test_full_disk_leaves_the_adapter_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dsla.convert.adapter as adapter

    def full(path: Path, *args: object) -> None:
        raise OSError(28, "No space left on device")

    trunk, levels = fresh()
    begin(tmp_path, levels.plan, RECIPE, [a_text(tmp_path)], teacher())
    for position, layer in enumerate(PLAN.order):
        save_layer(tmp_path, layer, levels.mixers[layer], {"position": position})
    before = read_manifest(tmp_path)
    monkeypatch.setattr(adapter, "write_tensors", full)
    with pytest.raises(AdapterError, match="No space left on device; the adapter is as it was"):
        adapter.save_stage(tmp_path, {"name": "nested"}, levels.mixers)
    assert read_manifest(tmp_path) == before


def test_the_model_continues_its_rows_the_same_way_each_time() -> None:
    trunk, levels = fresh()
    model = teacher()
    levels = Levels(model, levels.plan, levels.mixers)
    write = continued(model, levels)
    (rows,) = batches(1, 2)
    state = torch.get_rng_state()
    written = write(rows, 3, 5)
    assert written.shape == rows.shape and torch.equal(written[:, :16], rows[:, :16])
    assert torch.equal(written, write(rows, 3, 5)) and not torch.equal(written, write(rows, 3, 6))
    assert levels.level == 3 and torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"


def test_on_policy_steps_read_what_was_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def write(rows: torch.Tensor, level: int, seed: int) -> torch.Tensor:
        seen.append((level, seed))
        return rows

    trunk, levels = fresh()
    settings = dataclasses.replace(SETTINGS, on_policy=0.5)
    train_levels(
        trunk,
        levels,
        batches(24, 1),
        settings,
        3,
        tmp_path / "checkpoint",
        Part(),
        lambda step, steps, loss: None,
        write,
    )
    assert 4 < len(seen) < 20 and {level for level, _ in seen} == {3} and len(set(seen)) == len(seen)
