"""Whatever happens, each request's logits are the dense reference's for its tokens and level history."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.engine.schedules import Schedule

EVERYTHING = {"finished", "cancelled", "conversions", "parked", "replayed", "forked", "prefix hits"}


@pytest.mark.parametrize("block", range(10))
def test_random_schedules(block: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(20 * block, 20 * block + 20):
        schedule = Schedule(seed)
        schedule.run()
        counts.update(schedule.counts)
    assert set(+counts) >= EVERYTHING, "a kind of event never happened"


@pytest.mark.slow
def test_ten_thousand_random_schedules() -> None:
    counts: Counter[str] = Counter()
    for seed in range(10_000):
        schedule = Schedule(seed)
        schedule.run()
        counts.update(schedule.counts)
    assert set(+counts) >= EVERYTHING
    report("schedules", {"schedules": 10_000, **counts})


@pytest.mark.slow
def test_soak() -> None:
    """Half an hour, or `SOAK_SECONDS`, of random everything on engines that go on all the time."""
    seconds, counts = float(os.environ.get("SOAK_SECONDS", 1800)), Counter[str]()
    for seed in range(4):
        schedule = Schedule(seed)
        schedule.preempts, schedule.by_hand, schedule.by_policy = 0.05, 0.02, 0.02
        schedule.soak(seconds / 4)
        counts.update(schedule.counts)
    assert set(+counts) >= EVERYTHING
    report("soak", {"seconds": seconds, **counts})


def report(name: str, result: dict[str, float]) -> None:
    """Writes what was run to the folder `RESULTS_OUT` names, if it does."""
    if "RESULTS_OUT" in os.environ:
        (Path(os.environ["RESULTS_OUT"]) / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
