"""The bound of a step's time: prompts are read and layers converted only as far as it allows."""

from __future__ import annotations

import pytest

from dsla.engine import SamplingParams
from dsla.engine.cost import CostModel
from tests.engine.tiny import (
    FakeClock,
    assert_as_reference,
    no_policy,
    random_prompt,
    slow_folds,
    tiny_engine,
)

GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
LONG = random_prompt(60, 1)


def test_conversions_by_hand_are_spread_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    engine = tiny_engine(level=0, clock=clock, max_step_seconds=1.0)
    slow_folds(monkeypatch, clock, 0.3)
    engine.add_request(LONG, GREEDY, request_id="a")
    while not engine.outputs.get("a"):
        engine.step()
    engine.set_level(3)
    for level in (1, 2, 3):
        before = clock.now
        engine.step()
        assert engine._requests["a"].level == level
        assert clock.now - before <= 0.5
    engine.run()
    assert [level for _, level in engine.final["a"].levels] == [0, 1, 2, 3]
    assert "defer" not in {event["kind"] for event in engine.stats()["events"]}, "they lacked time, not memory"
    assert_as_reference(engine, "a", LONG)


def test_conversions_for_lack_of_memory_are_spread_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs the memory waits a step longer; nobody is preempted and no step exceeds its time."""
    clock = FakeClock()
    engine = tiny_engine(units=100, policy=no_policy, clock=clock, max_step_seconds=1.0, max_step_tokens=64)
    slow_folds(monkeypatch, clock, 0.6)
    prompts = {"long": random_prompt(45), "short": random_prompt(12, 1), "late": random_prompt(12, 3)}
    engine.add_request(prompts["long"], GREEDY, request_id="long")
    while not engine.outputs.get("long"):
        engine.step()
    for name in ("short", "late"):
        engine.add_request(prompts[name], GREEDY, request_id=name)
    while engine.has_work:
        before = clock.now
        engine.step()
        assert clock.now - before <= 0.6
    stats = engine.stats()
    assert stats["conversions"]["memory"] >= 2
    assert not [event for event in stats["events"] if event["kind"] == "preempt"]
    for name, prompt in prompts.items():
        assert_as_reference(engine, name, prompt)


def test_conversions_for_memory_leave_less_time_to_the_prompt_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, token_seconds = FakeClock(), 0.02
    cost = CostModel(0.0, 0.0, 0.0, 0.0, token_seconds, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    engine = tiny_engine(
        units=150, policy=no_policy, clock=clock, cost=cost, max_step_seconds=1.0, max_step_tokens=64, cache_bytes=0
    )
    slow_folds(monkeypatch, clock, 0.4)
    prompts = {"long": random_prompt(45), "new": random_prompt(40, 1)}
    engine.add_request(prompts["long"], GREEDY, request_id="long")
    while not engine.outputs.get("long"):
        engine.step()
    engine.add_request(prompts["new"], GREEDY, request_id="new")
    both = 0
    while engine.has_work:
        before, request = clock.now, engine._requests.get("new")
        known = request.computed if request else 0
        engine.step()
        read = min(request.computed, 40) - min(known, 40) if request else 0
        both += bool(read and clock.now > before)
        assert clock.now - before + read * token_seconds <= 1.0 + 1e-9
    assert both, "or no step has done both"
    for name, prompt in prompts.items():
        assert_as_reference(engine, name, prompt)


def test_a_request_that_waits_outside_hears_of_another_level(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    engine = tiny_engine(level=0, clock=clock, max_step_seconds=1.0, max_step_tokens=64, park_bytes=1 << 20)
    slow_folds(monkeypatch, clock, 0.6)
    engine.add_request(LONG, GREEDY, request_id="a")
    engine.step()
    engine.set_level(3)
    engine.step()
    engine._preempt(engine._requests["a"], 0.0)
    engine.set_level(0)
    engine.run()
    assert [level for _, level in engine.final["a"].levels] == [0, 1]
    assert_as_reference(engine, "a", LONG)


def test_conversions_of_a_replay_are_spread_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    engine = tiny_engine(level=0, clock=clock, max_step_seconds=1.0, cache_bytes=0, max_step_tokens=64)
    engine.add_request(LONG, GREEDY, request_id="a")
    engine.step()
    engine.set_level(3)
    engine.step()
    assert engine._requests["a"].levels == [(0, 0), (60, 3)]
    engine._preempt(engine._requests["a"], 0.0)
    slow_folds(monkeypatch, clock, 0.3)
    while engine.has_work:
        before = clock.now
        engine.step()
        assert clock.now - before <= 0.5
    assert clock.now == pytest.approx(0.9)
    assert engine.final["a"].levels == [[0, 0], [60, 3]]
    assert_as_reference(engine, "a", LONG)


@pytest.mark.parametrize("token_seconds", [0.01, 0.1])
def test_prompts_are_read_in_chunks_that_keep_to_the_time(token_seconds: float) -> None:
    """Chunks hold what the time of a step allows; at least `LEAST_CHUNK`, for a prompt has to go on."""
    cost = CostModel(0.0, 0.0, 0.0, 0.0, token_seconds, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    engine = tiny_engine(level=0, clock=FakeClock(), cost=cost, max_step_seconds=0.32, max_step_tokens=64)
    engine.add_request(LONG, GREEDY, request_id="a")
    counts = []
    while not engine.outputs.get("a"):
        before = engine._requests["a"].computed
        engine.step()
        counts.append(engine._requests["a"].computed - before)
    assert counts == ([32, 28] if token_seconds == 0.01 else [16, 16, 16, 12])
    engine.run()
    assert_as_reference(engine, "a", LONG)
