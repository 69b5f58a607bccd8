"""Costs are fitted to what was timed, and timed once a machine."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, astuple, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsla.engine import PackedDecoder
from dsla.engine import measure as measuring
from dsla.engine.cost import CostModel, StepWork
from dsla.engine.measure import Point, Scratch, fit, load_or_measure, measure
from dsla.families import family_of
from tests.engine.tiny import MIXER, tiny_decoder, tiny_model

POINTS = [
    StepWork.decode(32, 30, 0), StepWork.decode(2000, 30, 0), StepWork.decode(32, 0, 30),
    StepWork.decode(2000, 30, 0) + StepWork.decode(2000, 30, 0), StepWork.decode(9, 0, 30) + StepWork.decode(9, 0, 30),
    StepWork.prefill(64, 0, 30, 0), StepWork.prefill(256, 0, 30, 0), StepWork.prefill(256, 1800, 30, 0),
    StepWork.prefill(64, 0, 0, 30), StepWork.prefill(256, 1800, 0, 30),
]  # fmt: skip


@given(st.lists(st.floats(1e-9, 1e-2) | st.just(0.0), min_size=8, max_size=8), st.floats(1e-3, 1e-2))
def test_fit_finds_the_costs_behind_exact_times(rest: list[float], base: float) -> None:
    costs = CostModel(base, *rest, fold=0.0, fold_token=0.0)
    seconds = [costs.step_seconds(work) for work in POINTS]
    found = CostModel(*fit(POINTS, seconds), fold=0.0, fold_token=0.0)
    assert [found.step_seconds(work) for work in POINTS] == pytest.approx(seconds, rel=1e-4)


def test_fit_is_never_negative_and_leaves_out_what_was_not_timed() -> None:
    works = [StepWork.decode(10, 3, 0), StepWork.decode(1000, 3, 0), StepWork.prefill(10, 0, 3, 0)]
    costs = fit(works, [0.02, 0.01, 0.5])
    assert min(costs) >= 0
    assert costs[-2:] == [0.0, 0.0]


@pytest.mark.parametrize("level", [0, 3])
def test_measured_costs_of_a_tiny_model(level: int) -> None:
    decoder = tiny_decoder() if level else _without_mixers()
    costs = measure(decoder, seconds=0.2)
    assert costs.step_seconds(StepWork.decode(30, 4 - level, level)) > 0
    # Of so small a model, noise decides to which of the terms of a prompt its time goes.
    short, long = (costs.step_seconds(StepWork.prefill(tokens, 0, 4 - level, level)) for tokens in (1, 30))
    assert long > short
    keys = decoder.slot_bytes_moved / decoder.kv_spec.bytes_per_token
    assert (keys > 1) == bool(level) and costs.decode_converted >= keys * costs.decode_pair
    assert (costs.fold + costs.fold_token > 0) == bool(level)


def test_an_adapter_that_cannot_be_folded_has_no_cost_of_folds() -> None:
    costs = measure(tiny_decoder(replace(MIXER, gate_source="hidden")), seconds=0.1)
    assert costs.fold == costs.fold_token == 0


def test_a_context_of_a_few_tokens_is_enough() -> None:
    model = tiny_model()
    config = type(model.config)(**{**model.config.to_dict(), "max_position_embeddings": 3})
    family = family_of(config)
    decoder = PackedDecoder(tiny_decoder().weights, config, family, tiny_decoder().mixers)
    assert measure(decoder, seconds=0.1).base >= 0


def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SCRATCH_BYTES", 1 << 20)
    assert 32 <= Scratch(tiny_decoder()).context < 300


def test_costs_are_measured_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = CostModel(*(0.01 * i for i in range(1, 12)))
    monkeypatch.setattr(measuring, "measure", lambda decoder, seconds: calls.append(seconds) or made)
    assert load_or_measure(tiny_decoder()) == load_or_measure(tiny_decoder()) == made
    assert calls == [3.0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        load_or_measure(tiny_decoder())
    finally:
        torch.set_num_threads(before)
    load_or_measure(_without_mixers())
    assert len(calls) == 3
    assert len(list((empty_cache / "measured").glob("costs-*.json"))) == 3


def test_costs_from_a_busy_machine_are_not_remembered(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = iter([CostModel(*[0.9] * 11), CostModel(*[0.01] * 11)])
    monkeypatch.setattr(measuring, "measure", lambda decoder, seconds: next(found))
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(tiny_decoder()).base == 0.9
    assert "slow or busy machine" in caplog.text
    assert load_or_measure(tiny_decoder()).base == load_or_measure(tiny_decoder()).base == 0.01


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"measured": null}', '{"measured": {"base": 1.0}}', '{"measured": {"bass": 1.0}}'],
)
def test_a_damaged_file_is_measured_anew(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    made = CostModel(*[0.01] * 11)
    monkeypatch.setattr(measuring, "measure", lambda decoder, seconds: made)
    load_or_measure(tiny_decoder())
    (file,) = (empty_cache / "measured").iterdir()
    whole = file.read_text()
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(tiny_decoder()) == made
    assert "damaged" in caplog.text
    assert file.read_text() == whole


def test_a_negative_cost_on_disk_is_damage(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CostModel(*[0.01] * 11)
    monkeypatch.setattr(measuring, "measure", lambda decoder, seconds: made)
    load_or_measure(tiny_decoder())
    (file,) = (empty_cache / "measured").iterdir()
    file.write_text(json.dumps({"measured": {**asdict(made), "base": -1.0}}))
    assert load_or_measure(tiny_decoder()) == made


def test_a_cache_folder_that_cannot_be_written_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSLA_HOME", str(tmp_path / "file" / "cache"))
    made = CostModel(*[0.01] * 11)
    monkeypatch.setattr(measuring, "measure", lambda decoder, seconds: made)
    assert load_or_measure(tiny_decoder()) == made
    assert "cannot remember the costs" in caplog.text


@pytest.mark.slow
@pytest.mark.model
def test_steps_of_the_default_model_take_as_long_as_predicted(default_model: Path) -> None:
    from dsla.convert.load import find_adapter, find_model

    path, config = find_model(None)
    decoder = PackedDecoder.load(path, find_adapter(path, config, None, torch.bfloat16), torch.bfloat16)
    top = len(decoder.order)
    mixed = [
        Point(((0, 1000, 1),) * 2 + ((top, 1500, 1),) * 2),
        Point(((0, 512, 128), (0, 1500, 1), (top, 700, 1))),
        Point(((top, 1024, 200), (top, 300, 1), (0, 1900, 1))),
        Point(((0, 1024, 512),)),
    ]
    seconds = dict.fromkeys(mixed, math.inf)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        costs, scratch = measure(decoder), Scratch(decoder, clock=time.thread_time)
        for _ in range(7):
            seconds = {point: min(found, scratch.time(point)) for point, found in seconds.items()}
    finally:
        torch.set_num_threads(before)
    for point, found in seconds.items():
        # Within 20 per cent where the machine does nothing else.
        assert costs.step_seconds(point.work(decoder)) == pytest.approx(found, rel=0.35)


def _without_mixers() -> PackedDecoder:
    config = tiny_model().config
    return PackedDecoder(tiny_decoder().weights, config, family_of(config))


def test_astuple_of_work_is_in_the_order_of_the_costs() -> None:
    for place in range(8):
        work = StepWork(*(int(i == place) for i in range(8)))
        costs = CostModel(0.0, *(float(i == place) for i in range(8)), fold=0.0, fold_token=0.0)
        assert astuple(work)[place] == costs.step_seconds(work) == 1
