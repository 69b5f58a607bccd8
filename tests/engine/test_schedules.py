"""Whatever happens, each request's logits are the dense reference's for its tokens and level history."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.engine.schedules import Schedule

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "schedules.json"
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
    if "SCHEDULES_OUT" in os.environ:
        Path(os.environ["SCHEDULES_OUT"]).write_text(json.dumps({"schedules": 10_000, **counts}, indent=2) + "\n")
