"""Objectives for latency, from the clock to the levels: what is measured, what the policy is told, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest

from dsla.adaptive import PolicyConfig, make_policy
from dsla.engine import SamplingParams
from dsla.engine.cost import CostModel
from tests.engine.tiny import FakeClock, RecordingEngine, assert_as_reference, random_prompt, tiny_engine

COST = CostModel(
    base=0.001, kept_layer=0.0, converted_layer=0.0, row=0.0, token=1e-5, prefill_pair=1e-5, decode_pair=1e-3,
    prefill_converted=1e-5, decode_converted=1e-2, fold=1e-4, fold_token=1e-6,
)  # fmt: skip
"""Attention is dear: decodes gain from 10 keys on."""

LONG, SHORT = random_prompt(80), random_prompt(4, 1)
ANSWER = SamplingParams(max_tokens=300, ignore_eos=True)


def engine_of(clock: FakeClock, cost: CostModel = COST, **objectives: float) -> RecordingEngine:
    policy = make_policy(PolicyConfig(new_level_step=0.3, **objectives))
    return tiny_engine(policy=policy, clock=clock, cost=cost, max_step_tokens=64)


def steps(engine: RecordingEngine, clock: FakeClock, seconds: float, each: float) -> None:
    """Steps until so many seconds have gone by, `each` a step."""
    end = clock.now + seconds
    while clock.now < end - 1e-9:
        engine.step()
        clock.now += each


def rises(engine: RecordingEngine) -> list[tuple[int, int]]:
    """Changes of the level of new requests that gain time by it."""
    events = engine.stats()["events"]
    return [(e["from_level"], e["to_level"]) for e in events if e["kind"] == "new-fast-level"]


def started(engine: RecordingEngine, clock: FakeClock, name: str, prompt: list[int], **bounds: Any) -> int:
    """The level a new request starts at."""
    engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), request_id=name, **bounds)
    steps(engine, clock, 0.1, 0.05)
    (start,) = (e for e in engine.stats()["events"] if (e["kind"], e["request_id"]) == ("start", name))
    return int(start["to_level"])


def test_one_late_first_token_raises_levels_once_and_they_come_back() -> None:
    clock = FakeClock()
    engine = engine_of(clock, ttft_seconds=1.0, latency_cooldown_seconds=2.0, calm_seconds=4.0)
    engine.add_request(LONG, ANSWER, request_id="late")
    steps(engine, clock, 6.0, 1.5)
    assert rises(engine) == [(0, 1)]
    steps(engine, clock, 3.0, 0.1)
    assert rises(engine) == [(0, 1)], "the same evidence counts once"
    assert started(engine, clock, "long", random_prompt(70, 3)) == 1
    assert started(engine, clock, "short", SHORT) == 0
    assert started(engine, clock, "full", random_prompt(70, 4), quality="full") == 0
    steps(engine, clock, 12.0, 0.2)
    assert rises(engine) == [(0, 1), (1, 0)]


def test_first_tokens_that_stay_late_raise_levels_further() -> None:
    clock = FakeClock()
    engine = engine_of(clock, ttft_seconds=1.0, latency_cooldown_seconds=2.0)
    for number in range(12):
        engine.add_request(random_prompt(80, number), SamplingParams(max_tokens=2, ignore_eos=True))
        steps(engine, clock, 3.0, 1.5)
    assert rises(engine) == [(0, 1), (1, 2), (2, 3)]


def test_late_tokens_convert_what_gains_and_leave_the_others() -> None:
    clock = FakeClock()
    engine = engine_of(clock, tpot_seconds=0.2)
    engine.add_request(LONG, ANSWER, request_id="long")
    engine.add_request(SHORT, SamplingParams(max_tokens=5, ignore_eos=True), request_id="short")
    steps(engine, clock, 6.0, 0.3)
    assert engine.final["short"].levels == [[0, 0]]
    assert engine._requests["long"].level >= 1
    reasons = {e["reason"] for e in engine.stats()["events"] if e["kind"] == "level"}
    assert reasons == {"latency pressure"}
    steps(engine, clock, 200.0, 0.1)
    assert_as_reference(engine, "long", LONG)


def test_conversions_that_gain_too_little_are_not_made() -> None:
    clock = FakeClock()
    dear = CostModel(10.0, 0.0, 0.0, 0.0, 1e-5, 1e-4, 1e-3, 1e-3, 1e-2, 1e-4, 1e-6)
    engine = engine_of(clock, dear, ttft_seconds=1.0)
    engine.add_request(LONG, ANSWER, request_id="late")
    steps(engine, clock, 12.0, 1.5)
    assert engine._requests["late"].level == 0
    assert started(engine, clock, "long", random_prompt(70, 3)) == 0


def test_prompts_that_wait_are_predicted_at_the_level_they_would_start_at() -> None:
    clock = FakeClock()
    engine = engine_of(clock, ttft_seconds=100.0)
    for number in range(9):
        engine.add_request(random_prompt(70, number), ANSWER)
    before = engine._load.signals().waiting_seconds
    engine._levels._rules.new_fast_level = 3
    after = engine._load.signals().waiting_seconds
    assert before is not None and after is not None and after < 0.7 * before


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_does_no_harm(jump: float) -> None:
    clock = FakeClock()
    policy = make_policy(PolicyConfig(new_level_step=0.3, ttft_seconds=1.0, tpot_seconds=0.2))
    engine = tiny_engine(policy=policy, clock=clock, cost=COST, max_step_tokens=64, max_step_seconds=0.5)
    prompts = {f"r{i}": random_prompt(30 + 10 * i, i) for i in range(4)}
    for name, prompt in prompts.items():
        engine.add_request(prompt, SamplingParams(max_tokens=20, ignore_eos=True), request_id=name)
    for step in range(200):
        engine.step()
        clock.now += jump if step % 7 == 3 else 0.3
        if not engine.has_work:
            break
    assert set(engine.final) == set(prompts)
    for name, prompt in prompts.items():
        assert_as_reference(engine, name, prompt)
    assert engine.arena.free_units == engine.arena.n_units


def test_requests_are_checked_without_a_look_at_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may add and remove some at that moment."""

    class Changing(dict[str, Any]):
        def __iter__(self) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

        values = items = keys = __iter__

    engine = engine_of(FakeClock(), ttft_seconds=1.0)
    monkeypatch.setattr(engine._scheduler, "running", Changing())
    engine._levels._rules.new_fast_level = 2
    assert engine.check_request(LONG, ANSWER).max_tokens == 300
