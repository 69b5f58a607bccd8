"""The event log: totals, rates of the last seconds, and clocks that jump."""

from __future__ import annotations

import pytest

from dsla.engine.events import Event, EventLog


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
