"""Arithmetic of the cost model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsla.engine.cost import Correction, CostModel, StepWork
from dsla.errors import EngineError

COSTS = CostModel(
    base=10.0,
    kept_layer=0.25,
    converted_layer=0.75,
    row=1.0,
    token=2.0,
    prefill_pair=0.01,
    decode_pair=0.1,
    prefill_converted=0.5,
    decode_converted=3.0,
    fold=7.0,
    fold_token=0.2,
)


def test_a_step_is_the_sum_of_its_parts() -> None:
    work = StepWork.decode(9, kept=3, converted=1) + StepWork.prefill(4, prior=10, kept=2, converted=2)
    pairs = (11 + 12 + 13 + 14) * 2
    assert work == StepWork(3, 2, 1, 4, pairs, 30, 8, 1)
    layers = 3 * 0.25 + 2 * 0.75
    assert COSTS.step_seconds(work) == pytest.approx(10 + layers + 1 + 4 * 2 + pairs * 0.01 + 30 * 0.1 + 8 * 0.5 + 3)


def test_a_prompt_in_parts_is_the_same_work() -> None:
    whole = StepWork.prefill(100, 20, 3, 2)
    assert StepWork.prefill(37, 20, 3, 2) + StepWork.prefill(63, 57, 3, 2) == whole
    assert COSTS.prompt_seconds(100, 20, 3, 2, chunk=30) == pytest.approx(
        COSTS.step_seconds(whole) + 3 * (10 + 3 * 0.25 + 2 * 0.75)
    )
    assert COSTS.prompt_seconds(0, 20, 3, 2, chunk=30) == 0


def test_folds() -> None:
    assert COSTS.fold_seconds(100) == pytest.approx(27)
    assert COSTS.fold_seconds(0) == 0


@given(
    seconds=st.floats(0, 1e5),
    limit=st.integers(0, 5000),
    prior=st.integers(0, 10_000),
    kept=st.integers(0, 30),
    converted=st.integers(0, 30),
    rows=st.integers(0, 8),
)
def test_the_longest_chunk_within_a_bound(
    seconds: float, limit: int, prior: int, kept: int, converted: int, rows: int
) -> None:
    beside = sum((StepWork.decode(100, 3, 2) for _ in range(rows)), StepWork())
    tokens = COSTS.prefill_tokens_within(seconds, limit, prior, kept, converted, beside)

    def step(tokens: int) -> float:
        return COSTS.step_seconds(beside + StepWork.prefill(tokens, prior, kept, converted))

    assert 0 <= tokens <= limit
    assert tokens == 0 or step(tokens) <= seconds
    assert tokens == limit or step(tokens + 1) > seconds


def test_savings_are_differences_of_steps() -> None:
    step, decode, prefill = COSTS.step_seconds, StepWork.decode, StepWork.prefill
    for context in (0, 10, 29, 30, 1000):
        saving = step(decode(context, 3, 1)) - step(decode(context, 2, 2))
        assert COSTS.decode_saving_per_layer(context) == pytest.approx(saving)
    step = replace(COSTS, kept_layer=0.0, converted_layer=0.0).step_seconds
    for tokens, prior in ((1, 0), (90, 0), (110, 0), (10, 100), (1000, 5)):
        saving = step(prefill(tokens, prior, 3, 1)) - step(prefill(tokens, prior, 2, 2))
        assert COSTS.prefill_saving_per_layer(tokens, prior) == pytest.approx(saving)
    assert COSTS.decode_saving_per_layer(10) < 0 < COSTS.decode_saving_per_layer(40)
    assert COSTS.prefill_saving_per_layer(90) < 0 < COSTS.prefill_saving_per_layer(110)


def test_saving_of_a_request_is_that_of_its_steps() -> None:
    for rows in (1, 4):
        steps = sum(COSTS.decode_saving_per_layer(60 + i, rows) for i in range(5))
        whole = COSTS.prefill_saving_per_layer(50, 10) + steps
        assert COSTS.saving_per_layer(50, 5, prior=10, rows=rows) == pytest.approx(whole)
    assert COSTS.decode_saving_per_layer(60, 4, 4) > COSTS.decode_saving_per_layer(60, 1)


def test_a_layer_that_some_keep_and_others_convert_costs_both() -> None:
    step, decode = COSTS.step_seconds, StepWork.decode
    kept, converted = [decode(60, 4, 0)] * 5, [decode(60, 0, 4)] * 3
    before, after = (step(sum(rows, StepWork())) for rows in (kept + [decode(60, 4, 0)] * 3, kept + converted))
    saved = 3 * COSTS.decode_saving_per_layer(60, rows=math.inf, converted_rows=3)
    assert before - after == pytest.approx(4 * saved)


def test_time_of_a_request_is_that_of_its_steps() -> None:
    layers, step = 4, COSTS.step_seconds
    alone = sum(step(StepWork.decode(60 + i, layers, 0)) for i in range(5))
    assert COSTS.request_seconds(0, 5, layers, prior=60) == pytest.approx(alone)
    prompt = step(StepWork.prefill(50, 10, layers, 0)) - COSTS.base - layers * COSTS.kept_layer
    assert COSTS.request_seconds(50, 5, layers, prior=10) == pytest.approx(prompt + alone)
    shared = COSTS.request_seconds(0, 5, layers, prior=60, rows=4)
    assert alone - shared == pytest.approx(5 * 0.75 * (COSTS.base + layers * COSTS.kept_layer))


def test_keys_from_which_on_a_layer_pays() -> None:
    even = replace(COSTS, kept_layer=0.0, converted_layer=0.0)
    assert even.decode_saving_per_layer(round(COSTS.break_even_keys) - 1) == pytest.approx(0)
    assert replace(COSTS, decode_pair=0.0).break_even_keys == math.inf


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_costs_are_seconds(value: float) -> None:
    with pytest.raises(EngineError, match="cost row must be a number of seconds"):
        replace(COSTS, row=value)


def test_correction_follows_a_machine_that_gets_busy_and_quiet_again() -> None:
    correction = Correction()
    for _ in range(60):
        correction = correction.after(0.1, 0.3)
    assert correction.ratio == pytest.approx(3, rel=0.01)
    for _ in range(60):
        correction = correction.after(0.1, 0.1)
    assert correction.ratio == pytest.approx(1, rel=0.01)


def test_one_odd_step_changes_little_and_none_breaks_it() -> None:
    assert Correction().after(1e-3, 100.0).ratio < 1.6
    assert Correction(2.0).after(0.0, 1.0) == Correction(2.0).after(1.0, -1.0) == Correction(2.0)
    low = high = Correction()
    for _ in range(1000):
        low, high = low.after(1.0, 1e-9), high.after(1.0, 1e9)
    assert (low.ratio, high.ratio) == pytest.approx((1 / 64, 64.0))
