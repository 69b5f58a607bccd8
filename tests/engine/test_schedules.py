"""Whatever happens, each request's logits are the dense reference's for its tokens and level history."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.engine.schedules import Schedule
from tests.reports import report

EVERYTHING = {
    "finished",
    "cancelled",
    "conversions",
    "parked",
    "replayed",
    "forked",
    "prefix hits",
    "steps out of time",
}


def run(seeds: range) -> Counter[str]:
    """Runs and checks the schedules of these seeds; what happened in them, name -> how often."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        schedule = Schedule(seed)
        schedule.run()
        counts.update(schedule.counts)
    return counts


@pytest.mark.parametrize("block", range(10))
def test_random_schedules(block: int) -> None:
    assert set(+run(range(20 * block, 20 * block + 20))) >= EVERYTHING, "a kind of event never happened"


@pytest.mark.slow
def test_ten_thousand_random_schedules() -> None:
    """A process a core, one thread each."""
    counts: Counter[str] = Counter()
    blocks = [range(first, first + 50) for first in range(0, 10_000, 50)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for of_block in pool.map(run, blocks):
            counts.update(of_block)
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
