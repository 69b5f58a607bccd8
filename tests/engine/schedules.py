"""Random schedules: everything that may happen to requests, at any moment, in any company, with any memory."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dsla.engine import Decision, RequestSummary, SamplingParams, Signals
from dsla.engine.cost import CostModel
from dsla.engine.request import Status
from dsla.errors import EngineError
from tests.engine.tiny import EOS, RecordingEngine, assert_as_reference, random_prompt, tiny_engine

OPTIONS: list[dict[str, Any]] = [
    {}, {}, {}, {"quality": "full"}, {"quality": "balanced"}, {"max_level": 2}, {"min_level": 1},
]  # fmt: skip


COST = CostModel(
    base=0.05, kept_layer=0.01, converted_layer=0.02, row=0.01, token=0.03, prefill_pair=0.0005, decode_pair=0.001,
    prefill_converted=0.005, decode_converted=0.01, fold=0.1, fold_token=0.005,
)  # fmt: skip


class RandomClock:
    """Seconds that pass at random whenever somebody asks, so that whatever is timed may take long."""

    def __init__(self, seed: int, mean: float) -> None:
        self.rng, self.mean, self.now = random.Random(seed), mean, 0.0

    def __call__(self) -> float:
        self.now += self.rng.expovariate(1 / self.mean)
        return self.now


class Schedule:
    """One random schedule, run to its end and checked request by request against the dense reference.

    Args:
        seed: of everything random.
        requests: how many are offered; siblings come on top.

    Attributes:
        counts: what happened, name -> how often.
    """

    def __init__(self, seed: int, requests: int = 6) -> None:
        self.rng = random.Random(seed)
        self.by_hand, self.by_policy = seed % 2 * 0.08, seed % 4 // 2 * 0.1
        self.preempts = self.rng.choice([0.0, 0.0, 0.05, 0.2])
        self.offers = requests
        tick = self.rng.choice([0.01, 0.05, 0.1])
        timed = {"cost": COST, "max_step_seconds": 1.0} if self.rng.random() < 0.5 else {}
        self.engine = tiny_engine(
            units=self.rng.randint(60, 160),
            policy=self._policy,
            clock=RandomClock(seed, tick),
            page_tokens=self.rng.choice([1, 2, 2, 3, 5]),
            **timed,
            max_running=self.rng.choice([2, 4, 8]),
            max_step_tokens=self.rng.choice([9, 13, 24, 64]),
            open_ended_tokens=20,
            reserve_tokens=self.rng.choice([0, 4, 256]),
            cache_bytes=self.rng.choice([None, None, 0, 20_000]),
            park_bytes=self.rng.choice([0, 30_000, 1 << 30]),
            max_events=1_000_000,
        )
        self.asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self.counts: Counter[str] = Counter()
        self.number = 0

    def run(self) -> None:
        """Offers all requests and runs them to their ends."""
        offered, steps = 0, 0
        while offered < self.offers or self.engine.has_work:
            steps += 1
            assert steps < 3000, "the engine does not come to an end"
            offered += self._step(offered < self.offers)
        self._finish()

    def soak(self, seconds: float) -> None:
        """Offers requests for so long, checks and forgets those that have ended, and runs the rest to their ends."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._step(len(self.engine._requests) < 20)
            if len(self.engine.final) > 50:
                self._check()
        while self.engine.has_work:
            self._step(False)
        self._finish()

    def _step(self, offering: bool) -> bool:
        """One step, and what happens before it by chance; whether a request was offered."""
        engine, rng = self.engine, self.rng
        offered = offering and rng.random() < 0.4
        if offered:
            self.number += 1
            self._offer(f"r{self.number}")
        if rng.random() < self.by_hand:
            engine.set_level(rng.choice([None, None, 0, 1, 2, 3]))
        if self.asked and rng.random() < 0.03:
            engine.cancel(rng.choice(list(self.asked)))
        running = [r for r in engine._requests.values() if r.status is Status.RUNNING]
        if running and rng.random() < self.preempts:
            engine._preempt(rng.choice(running), 0.0)
        engine.step()
        self.counts["steps out of time"] += not engine._pace.converts()
        assert_bytes_add_up(engine)
        return offered

    def _offer(self, name: str) -> None:
        rng = self.rng
        prompt = self._prompt()
        sampled = (
            {"temperature": 0.9, "top_k": rng.choice([0, 7]), "seed": rng.randint(0, 99)} if rng.random() < 0.3 else {}
        )
        params = SamplingParams(max_tokens=rng.choice([None, rng.randint(1, 24)]), ignore_eos=True, **sampled)
        options = rng.choice(OPTIONS)
        for index in range(rng.choice([1, 1, 1, 3])):
            own = name if not index else f"{name}.{index}"
            if index:
                # With a seed of its own, so that its text and what it remembers become others than its sibling's.
                params = replace(params, temperature=0.9, seed=100 + index)
            with contextlib.suppress(EngineError):
                self.engine.add_request(prompt, params, request_id=own, sibling_of=name if index else None, **options)
                self.asked[own] = (prompt, params)

    def _prompt(self) -> list[int]:
        """A new text, a beginning others share, or an earlier request's text and answer with more behind it."""
        rng = self.rng
        kind = rng.random()
        tail = random_prompt(rng.choice([1, 2, 5, 12, 25, 45, 60]), rng.randint(0, 10**6))
        for _ in range(rng.choice([0, 0, 1, 3])):
            tail[rng.randrange(len(tail))] = EOS  # as where messages end
        if kind < 0.4:
            return tail
        if kind < 0.7 or not self.asked:
            return random_prompt(30, rng.randint(0, 1)) + tail[:20]
        name = rng.choice(list(self.asked))
        return (self.asked[name][0] + self.engine.outputs.get(name, []) + tail[:20])[:100]

    def _policy(
        self, state: Any, signals: Signals, summaries: Sequence[RequestSummary], now: float
    ) -> tuple[Any, list[Decision]]:
        names = [None, *(summary.id for summary in summaries)]
        rng = self.rng
        return state, [Decision(name, rng.randint(0, 3), "chance") for name in names if rng.random() < self.by_policy]

    def _finish(self) -> None:
        engine = self.engine
        assert engine.arena.free_units == engine.arena.n_units, "live memory is left"
        engine._cache.clear()
        assert engine.arena.unused_units == engine.arena.n_units, "memory is left"
        assert engine.parked_bytes == 0
        self._check()
        assert not self.asked

    def _check(self) -> None:
        """All requests that have ended are as the reference; they are forgotten."""
        engine = self.engine
        self.counts.update(happened(engine))
        engine._log._events.clear()
        for name in list(engine.final):
            prompt, params = self.asked.pop(name)
            assert engine.final[name].finish_reason in ("length", "abort")
            assert_as_reference(engine, name, prompt, params)
            for known in (engine.final, engine.outputs, engine.logits):
                known.pop(name, None)


def assert_bytes_add_up(engine: RecordingEngine) -> None:
    """What the arena says is in use is what tables and slots of requests and snapshots hold, and no slot has two owners."""
    arena, snapshots = engine.arena, engine._cache._snapshots
    live = [request.memory for request in engine._requests.values() if request.memory is not None]
    held, slots = [], []
    for memories in (live, [snapshot.memory for snapshot in snapshots]):
        tables = [table.units for memory in memories for table in memory._tables if table is not None]
        held.append(np.bincount(np.concatenate([np.empty(0, np.int64), *tables]), minlength=arena.n_units) > 0)
        slots.append([slot for memory in memories for slot in memory._slots.values()])
    blocks = np.array(slots[0] + slots[1], dtype=np.int64)
    in_slots = (blocks[:, None] * arena.slot_units + np.arange(arena.slot_units)).ravel()
    pages = held[0] | held[1]
    assert len(set(in_slots.tolist())) == len(in_slots) and not pages[in_slots].any(), "memory with two owners"
    assert arena.kv_bytes == int(held[0].sum()) * arena.page_bytes
    assert arena.state_bytes == len(slots[0]) * arena.slot_units * arena.page_bytes
    kept = int((held[1] & ~held[0]).sum()) + len(slots[1]) * arena.slot_units
    assert arena.kept_bytes == kept * arena.page_bytes
    assert arena.unused_units == arena.n_units - int(pages.sum()) - len(in_slots)


def happened(engine: RecordingEngine) -> dict[str, int]:
    """What happened in an engine, name -> how often."""
    events = engine.stats()["events"]
    return {
        "requests": sum(event["kind"] == "accept" for event in events),
        "finished": sum(event["kind"] == "finish" for event in events),
        "cancelled": sum(event["kind"] == "cancel" for event in events),
        "conversions": sum(event["to_level"] - event["from_level"] for event in events if event["kind"] == "level"),
        "parked": sum(event["reason"] == "parked" for event in events),
        "replayed": sum(event["reason"] == "to be replayed" for event in events),
        "forked": sum(event["reason"] == "forked" for event in events),
        "prefix hits": sum(bool(out.cached_tokens) for out in engine.final.values()),
    }
