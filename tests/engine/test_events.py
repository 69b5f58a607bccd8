"""The event log: totals, rates of the last seconds, times of what the engine does, and clocks that jump."""

from __future__ import annotations

import pytest

from dsla.engine import Engine, SamplingParams
from dsla.engine.events import Event, EventLog
from tests.engine.tiny import FakeClock, random_prompt, slow_folds, tiny_engine


def test_rates_are_of_the_last_ten_seconds() -> None:
    log = EventLog(10)
    for second in range(30):
        log.count_step(float(second), 100, 5)
    found = log.summary(30.0)
    assert found["prompt_tokens"] == 3000
    assert found["prompt_tokens_per_second"] == pytest.approx(100)
    assert found["generated_tokens_per_second"] == pytest.approx(5)


@pytest.mark.parametrize("jump", [-1000.0, 1000.0])
def test_rates_survive_a_clock_that_jumps(jump: float) -> None:
    log = EventLog(10)
    for second in range(100):
        log.count_step(float(second), 100, 5)
    for second in range(20):
        log.count_step(100.0 + jump + second, 50, 5)
    assert log.summary(120.0 + jump)["prompt_tokens_per_second"] == pytest.approx(50)
    assert log.steps == 120


def test_the_latest_events_are_kept_and_all_are_counted() -> None:
    log = EventLog(3)
    for i in range(5):
        log.add(Event(float(i), "level", f"r{i}", "memory", 0, 2, 10, 100))
    found = log.summary(5.0)
    assert [event["request_id"] for event in found["events"]] == ["r2", "r3", "r4"]
    assert found["conversions"] == {"memory": 10}


@pytest.mark.parametrize(
    ("after", "expected"),
    [(0, ["r2", "r3", "r4"]), (1, ["r2", "r3", "r4"]), (3, ["r3", "r4"]), (5, []), (6, ["r2", "r3", "r4"])],
    ids=str,
)
def test_events_that_are_known_can_be_left_out(after: int, expected: list[str]) -> None:
    log = EventLog(3)
    for i in range(5):
        log.add(Event(float(i), "start", f"r{i}", "admitted"))
    found = log.summary(5.0, after)
    assert found["event_count"] == 5
    assert [event["request_id"] for event in found["events"]] == expected


def test_preemptions_are_counted_by_what_became_of_the_request() -> None:
    log = EventLog(1)
    for reason in ("parked", "parked", "to be replayed"):
        log.add(Event(0.0, "preempt", "r", reason))
    assert log.summary(0.0)["preemptions"] == {"parked": 2, "to be replayed": 1}


def latencies(engine: Engine) -> dict[str, tuple[int, float]]:
    """How many there were of each kind, and their sum."""
    return {name: (sum(times["counts"]), times["sum"]) for name, times in engine.stats()["times"].items()}


def test_times_of_requests_are_counted() -> None:
    clock = FakeClock()
    engine = tiny_engine(clock=clock)
    for name in ("a", "b"):
        engine.add_request(random_prompt(4), SamplingParams(max_tokens=4, ignore_eos=True), request_id=name)
    clock.now = 3.0  # both wait so long
    while engine.has_work:
        engine.step()
        clock.now += 2.0
    found = latencies(engine)
    assert found["queue"] == (2, 6.0)
    assert found["ttft"] == (2, 6.0)
    assert found["itl"] == (6, 12.0)
    assert found["tpot"] == (2, 4.0)
    assert found["e2e"] == (2, 18.0)
    assert engine.stats()["asked_tokens"] == 8


def test_prompt_tokens_that_others_had_computed_are_counted() -> None:
    engine = tiny_engine()
    prompt = random_prompt(10)
    for _ in range(2):
        engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.run()
    stats = engine.stats()
    assert (stats["asked_tokens"], stats["cached_tokens"]) == (20, 9)


def test_conversions_are_timed_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    slow_folds(monkeypatch, clock, 0.5)
    engine = tiny_engine(clock=clock)
    engine.add_request(random_prompt(8), SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    engine.set_level(2)
    engine.run()
    assert latencies(engine)["fold"] == (2, 1.0)


def test_warm_up_leaves_nothing_behind() -> None:
    engine = tiny_engine()
    engine.warm_up()
    stats = engine.stats()
    assert stats["free_bytes"] == stats["budget_bytes"]
    assert (stats["cached_bytes"], stats["steps"], stats["snapshots"]) == (0, 0, 0)


def test_warm_up_passes_over_levels_that_the_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(units=32)
    pages = engine.arena.page_count(16)
    assert 4 * pages <= 32 < pages + 3 * engine.arena.slot_units
    shapes = []
    forward = engine.decoder.forward
    monkeypatch.setattr(
        type(engine.decoder),
        "forward",
        lambda _, batch, arena: shapes.append(batch.segments[0].memory.kept_layers) or forward(batch, arena),
    )
    engine.warm_up()
    assert shapes == [4, 4]
