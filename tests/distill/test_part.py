"""A conversion cut into parts ends in the same weights; every part gets further."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsla.convert.adapter import layer_file, read_manifest
from dsla.distill import convert, descent
from dsla.distill import part as part_module
from dsla.distill.descent import Meter
from dsla.distill.part import Part, TimeUp
from dsla.distill.recipe import StageSettings
from dsla.errors import TrainingError
from dsla.mixers import DslaMixer
from tests.distill.tiny import PLAN, RECIPE, TinyTokenizer, teacher, write_text

RECIPE = dataclasses.replace(
    RECIPE,
    stages=(StageSettings(tokens=512, seq_len=32, batch_tokens=64, valid_tokens=64, lr=0.003, tolerance=9.0),),
)


def test_time_is_up_only_after_something_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(part_module.time, "monotonic", lambda: now[0])
    part = Part(minutes=2, checkpoint_seconds=50)
    assert not part.due()
    now[0] = 51.0
    assert part.due()
    part.kept("here")
    assert not part.due()
    now[0] = 120.0
    assert part.due()
    with pytest.raises(TimeUp, match="step 3 of 9"):
        part.kept("step 3 of 9")


def in_parts(text: list[object], out: Path, minutes: float) -> list[str]:
    """Where each part of a conversion ended."""
    ends = []
    while True:
        try:
            convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, out, part=Part(minutes))
        except TimeUp as stop:
            ends.append(str(stop))
        else:
            return ends


def weights(out: Path) -> dict[str, bytes]:
    names = [layer_file(layer, "nested") for layer in PLAN.order]
    return {name: (out / name).read_bytes() for name in names}


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_parts_end_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    text = write_text(tmp_path)
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "whole")
    if late:
        # As on a GPU, where losses are read some steps late.
        monkeypatch.setattr(descent, "steps_at_once", lambda parameter: 5)
    ends = in_parts(text, tmp_path / "parts", 0.0)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    expected, found = (read_manifest(tmp_path / name) for name in ("whole", "parts"))
    for key in ("layers", "stages"):
        for entry in (found[key], expected[key]):
            for record in entry.values() if isinstance(entry, dict) else entry:
                for name in ("seconds", "made_on", "tokens_per_second", "flop_per_second"):
                    record.pop(name, None)
    assert found["layers"] == expected["layers"] and found["stages"] == expected["stages"]
    steps = [f"step {step} of 16 of layer 1" for step in ((5, 10, 15, 16) if late else range(1, 17))]
    assert ends[: len(steps) + 1] == [*steps, "layer 1 done"]
    assert ends[-1] == "stage nested done"


def test_loss_read_late_still_stops_at_its_step_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, prefill, calls = write_text(tmp_path), DslaMixer.prefill, []

    def poisoned(self, x, q, k, v, *rest):  # type: ignore[no-untyped-def]
        y, memory = prefill(self, x, q, k, v, *rest)
        calls.append(None)
        return (y * torch.nan if len(calls) > 7 else y), memory

    monkeypatch.setattr(descent, "steps_at_once", lambda parameter: 5)
    monkeypatch.setattr(DslaMixer, "prefill", poisoned)
    with pytest.raises(TrainingError, match="the loss is nan at layer 1, step 7 of 16: lower train.lr"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out", part=Part(checkpoint_seconds=0.0))
    monkeypatch.setattr(DslaMixer, "prefill", prefill)
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out")
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_speed_is_that_of_the_steps_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []
    monkeypatch.setattr(descent.time, "monotonic", lambda: now[0])
    meter = Meter(lambda *step: seen.append(step), tokens=1000, flops=5e9)
    assert meter.speed == {}
    for step in (8, 9, 10):
        now[0] += 2.0
        meter(step, 10, 0.5)
    assert meter.speed == {"tokens_per_second": 50.0, "flop_per_second": 2.5e8}
    assert seen[0] == (8, 10, 0.5)
