"""Crossover of the tiny model: the grid, the bytes of a step, the record and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsla.bench import crossover as crossover_module
from dsla.bench.crossover import STEPS, Grid, Room, crossing, measure
from dsla.bench.plots import plot_crossover
from dsla.bench.roofline import read_bandwidth, step_bytes
from dsla.errors import ConfigError
from tests.engine.tiny import tiny_decoder


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossover_module, "read_bandwidth", lambda: read_bandwidth(1 << 20))
        return measure(tiny_decoder(), Grid((0, 1, 3), (16, 40), batch=2, rounds=2))


@pytest.mark.parametrize(
    ("base", "other", "expected"),
    [
        ((1.0, 2.0, 4.0), (2.0, 2.0, 2.0), 200.0),
        ((1.0, 2.0, 4.0), (2.0, 2.5, 3.0), 200.0 + 200.0 / 3),
        ((1.0, 2.0, 4.0), (0.5, 1.0, 2.0), 100.0),
        ((1.0, 2.0, 4.0), (1.0, 2.0, 4.0), None),
        ((1.0, 2.0, 4.0), (2.0, 3.0, 5.0), None),
    ],
)
def test_crossing_lies_between_the_contexts_it_is_between(
    base: tuple[float, ...], other: tuple[float, ...], expected: float | None
) -> None:
    found = crossing((100, 200, 400), base, other)
    assert found == (pytest.approx(expected) if expected else None)


def test_grid_has_level_0_and_quarters() -> None:
    decoder = tiny_decoder()
    assert Grid.of(decoder, None, [40, 16, 16], 1, 1) == Grid((0, 1, 2, 3), (16, 40), 1, 1)
    assert Grid.of(decoder, [3], [16], 2, 5).levels == (0, 3)
    with pytest.raises(ConfigError, match=r"level 4 is out of range, this model has levels 0 ... 3"):
        Grid.of(decoder, [4], [16], 1, 1)
    with pytest.raises(ConfigError, match=rf"510 tokens are out of range, this model reads 1 ... {512 - STEPS}"):
        Grid.of(decoder, None, [510], 1, 1)


@pytest.mark.parametrize("level", [0, 2, 3])
def test_bytes_of_a_step_are_those_of_weights_caches_and_states(level: int) -> None:
    decoder = tiny_decoder()
    moved = step_bytes(decoder, level, 100, 3)
    again = step_bytes(decoder, level, 200, 6)
    # 4 layers, 2 heads of 6, keys and values, 8 bytes.
    assert moved.kv == 3 * (4 - level) * 100 * 2 * 2 * 6 * 8
    assert again.kv == 4 * moved.kv and again.states == 2 * moved.states and again.weights == moved.weights
    slot = decoder.slot_spec
    assert slot is not None
    assert 3 * level * slot.fixed_bytes <= moved.states <= 6 * level * slot.fixed_bytes
    assert moved.weights >= decoder.weights.layers[0].qkv.weight.nbytes * 4  # type: ignore[union-attr]
    assert moved.weights <= decoder.nbytes
    assert moved.total == moved.weights + moved.kv + moved.states


def test_room_decodes_after_any_context() -> None:
    room = Room(tiny_decoder(), 2, 3, 48 + STEPS)
    seconds = room.prefill([16, 33, 48])
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert len(room.decode(48)) == STEPS and len(room.decode(5, 3)) == 3


def test_bandwidth_is_that_of_a_memory() -> None:
    assert 1e8 < read_bandwidth(1 << 22) < 1e13


def test_record_holds_every_round_and_its_medians(record: dict[str, Any]) -> None:
    assert [row["level"] for row in record["rows"]] == [0, 1, 3]
    assert len(record["read_bandwidth"]) == 2
    for row in record["rows"]:
        for name in ("prefill", "decode"):
            rounds = row["rounds"][name]
            assert list(rounds) == [16, 40] and all(len(found) == 2 for found in rounds.values())
            assert row[f"{name}_seconds"] == pytest.approx([sum(found) / 2 for found in rounds.values()])
        assert row["decode_tokens_per_second"] == pytest.approx([2 / s for s in row["decode_seconds"]])
        assert all(seconds > 0 for seconds in row["decode_roofline_seconds"])
    assert record["rows"][0]["prefill_crossover"] is None
    assert record["machine"]["threads"] == torch.get_num_threads()


def test_picture_is_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    plot_crossover(record, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
