"""The policy on latencies: objectives, loads that swing, loads that mean harm, and what must hold under any load."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsla.adaptive import PolicyConfig, PolicyState, decide
from dsla.engine import Decision, RequestSummary, Signals
from dsla.engine.signals import start_level
from dsla.errors import ConfigError

CONFIG = PolicyConfig(
    high_water=0.8, low_water=0.4, cooldown_seconds=1.0, calm_seconds=10.0, new_level_step=0.25,
    ttft_seconds=2.0, tpot_seconds=0.1, latency_low=0.6, latency_cooldown_seconds=2.0,
)  # fmt: skip
MAX_LEVEL = 8


def load(used: int = 100, new_level: int = 0, new_fast_level: int = 0, **latencies: Any) -> Signals:
    return Signals(
        budget_bytes=1000, kv_bytes=used, state_bytes=0, wanted_bytes=0, new_level=new_level, max_level=MAX_LEVEL,
        new_fast_level=new_fast_level, **latencies,
    )  # fmt: skip


def running(
    name: str,
    decode: float = 0.0,
    prefill: float = 0.0,
    fold: float = 0.0,
    level: int = 0,
    max_level: int = MAX_LEVEL,
    saving: int = 10,
    tokens: int = 100,
    seconds: float = 1e-9,
) -> RequestSummary:
    return RequestSummary(
        id=name, level=level, max_level=max_level, computed_tokens=100, saving_per_layer=saving, prompt_bytes=0,
        prompt_saving_per_layer=saving, new_tokens_left=tokens, decode_saving_per_layer=decode,
        prefill_saving_per_layer=prefill, fold_seconds_per_layer=fold, full_seconds=seconds,
    )  # fmt: skip


LATE = {"ttft": {"ttft_seconds": 2.1}, "itl": {"itl_seconds": 0.11}, "waiting": {"waiting_seconds": 2.1}}


@pytest.mark.parametrize("latency", LATE.values(), ids=LATE.keys())
def test_a_missed_objective_raises_what_gains_by_it(latency: dict[str, float]) -> None:
    summaries = [running("gains", 0.01), running("loses", -0.01), running("even", 0.0)]
    _, decisions = decide(None, load(**latency), summaries, 0.0, CONFIG)
    assert [decision.request_id for decision in decisions] == ["gains", None]
    assert {decision.reason for decision in decisions} == {"latency pressure"}
    assert decisions[1] == Decision(None, 2, "latency pressure", min_gain=0.1)


@pytest.mark.parametrize("latency", LATE.values(), ids=LATE.keys())
def test_without_objectives_latencies_mean_nothing(latency: dict[str, float]) -> None:
    config = replace(CONFIG, ttft_seconds=None, tpot_seconds=None)
    _, decisions = decide(None, load(**latency), [running("a", 0.01)], 0.0, config)
    assert decisions == []


def test_a_fold_that_does_not_pay_any_more_is_not_made() -> None:
    late = load(itl_seconds=0.2)
    _, decisions = decide(None, late, [running("ends", 0.001, fold=0.05, tokens=49)], 0.0, CONFIG)
    assert [decision.request_id for decision in decisions] == [None]
    _, decisions = decide(None, late, [running("goes on", 0.001, fold=0.05, tokens=51)], 0.0, CONFIG)
    assert [decision.request_id for decision in decisions] == ["goes on", None]


def test_long_requests_go_first_and_only_as_far_as_needed() -> None:
    late = load(itl_seconds=0.12)
    _, decisions = decide(None, late, [running("short", 0.002), running("long", 0.03)], 0.0, CONFIG)
    assert {d.request_id: d.level for d in decisions if d.request_id} == {"long": 2}


def test_a_round_raises_a_request_by_no_more_than_a_step() -> None:
    _, decisions = decide(None, load(ttft_seconds=1e6), [running("a", 1e-3, level=1)], 0.0, CONFIG)
    assert decisions[0] == Decision("a", 3, "latency pressure", min_gain=0.1)


def test_cooldown_between_rounds() -> None:
    late, summaries = load(ttft_seconds=9.0), [running("a", 0.01)]
    state, first = decide(None, late, summaries, 0.0, CONFIG)
    state, second = decide(state, late, summaries, 1.9, CONFIG)
    state, third = decide(state, late, summaries, 2.0, CONFIG)
    assert first and third and not second


def test_memory_does_not_wait_for_the_cooldown_of_latency() -> None:
    state, _ = decide(None, load(ttft_seconds=9.0), [running("a", 0.01)], 0.0, CONFIG)
    _, decisions = decide(state, load(900, ttft_seconds=9.0), [running("a", 0.01)], 0.1, CONFIG)
    assert {decision.reason for decision in decisions} == {"memory pressure"}


def test_both_pressures_name_a_request_once_at_the_higher_level() -> None:
    both = load(900, ttft_seconds=9.0)
    _, decisions = decide(None, both, [running("a", 0.001, saving=250), running("b", 0.001, saving=1)], 0.0, CONFIG)
    found = {decision.request_id: decision for decision in decisions if decision.request_id}
    assert len(decisions) == 4 and len(found) == 2
    assert found["a"] == Decision("a", 2, "memory pressure")
    assert found["b"] == Decision("b", 2, "latency pressure", min_gain=0.1)
    new = [decision for decision in decisions if decision.request_id is None]
    assert [(decision.level, decision.min_gain) for decision in new] == [(2, None), (2, 0.1)]


def test_no_calm_time_begins_right_after_a_rise() -> None:
    config = replace(CONFIG, calm_seconds=3.0)
    state, _ = decide(None, load(ttft_seconds=9.0), [], 0.0, config)
    falls = []
    for now in range(1, 9):  # what was late has been forgotten
        state, decisions = decide(state, load(new_fast_level=2), [], float(now), config)
        falls += [now] * len(decisions)
    assert falls[:1] == [6]


def test_new_requests_come_back_when_both_are_calm() -> None:
    state, now = PolicyState(), 0.0
    for busy in (load(500, 4, 4), load(100, 4, 4, ttft_seconds=1.3), load(100, 4, 4, itl_seconds=0.07)):
        for _ in range(30):
            state, decisions = decide(state, busy, [], now, CONFIG)
            assert decisions == []
            now += 1.0
    state, decisions = decide(state, load(100, 4, 4, ttft_seconds=1.1, itl_seconds=0.05), [], now, CONFIG)
    assert decisions == []
    _, decisions = decide(state, load(100, 4, 4), [], now + 10.0, CONFIG)
    assert decisions == [Decision(None, 2, "pressure gone"), Decision(None, 2, "pressure gone", min_gain=0.1)]


def test_cached_bytes_are_no_pressure() -> None:
    _, decisions = decide(None, load(300, cached_bytes=700), [running("a")], 0.0, CONFIG)
    assert decisions == []


def test_a_small_gain_is_none() -> None:
    # All eight layers converted save 0.8 s.
    late = load(itl_seconds=0.2)
    for seconds, converted in ((7.9, ["a"]), (8.1, [])):
        _, decisions = decide(None, late, [running("a", 0.001, seconds=seconds)], 0.0, CONFIG)
        assert [d.request_id for d in decisions if d.request_id] == converted
    # What is converted already is part of the gain: it does not stop half-way.
    _, decisions = decide(None, late, [running("a", 0.001, level=7, seconds=7.9)], 0.0, CONFIG)
    assert [(d.request_id, d.level) for d in decisions if d.request_id] == [("a", 8)]


@given(saves_memory=st.booleans(), saves_time=st.booleans())
def test_new_requests_start_where_a_level_pays(saves_memory: bool, saves_time: bool) -> None:
    for new_level, new_fast_level in ((5, 8), (5, 3), (0, 0)):
        paying = [0, *[new_level] * saves_memory, *[new_fast_level] * saves_time]
        assert start_level(new_level, new_fast_level, saves_memory, saves_time) == max(paying)


class Sim:
    """What an engine does with decisions, and how often levels of new requests changed."""

    def __init__(self, summaries: list[RequestSummary] | None = None, config: PolicyConfig = CONFIG) -> None:
        self.state: Any = None
        self.summaries, self.config = {s.id: s for s in summaries or []}, config
        self.new = {False: 0, True: 0}
        self.changes: list[tuple[float, int]] = []

    def step(self, now: float, used: int = 100, **latencies: Any) -> None:
        signals = load(used, self.new[False], self.new[True], **latencies)
        self.state, decisions = decide(self.state, signals, list(self.summaries.values()), now, self.config)
        for decision in decisions:
            if decision.request_id is None:
                self.changes.append((now, decision.level - self.new[decision.min_gain is not None]))
                self.new[decision.min_gain is not None] = decision.level
            else:
                summary = self.summaries[decision.request_id]
                assert summary.level < decision.level <= summary.max_level
                self.summaries[decision.request_id] = replace(summary, level=decision.level)


@pytest.mark.parametrize("period", [0.5, 3.0, 8.0, 19.0])
def test_a_latency_that_swings_does_not_make_levels_swing(period: float) -> None:
    sim = Sim([running("a", 0.01)])
    for tick in range(4000):
        now = tick * 0.1
        sim.step(now, ttft_seconds=1.6 + 1.5 * math.sin(now * 2 * math.pi / period))
    assert [change for _, change in sim.changes] == [2, 2, 2, 2]
    assert sim.new == {False: 0, True: 8}


def test_a_slow_swing_changes_levels_at_most_once_a_cooldown_or_calm() -> None:
    sim = Sim()
    for tick in range(10_000):
        now = tick * 0.1
        sim.step(now, ttft_seconds=1.6 + 1.5 * math.sin(now * 2 * math.pi / 100))
    cycles = 10
    assert len(sim.changes) <= cycles * 2 * 4
    for (before, _), (after, change) in zip(sim.changes, sim.changes[1:], strict=False):
        assert after - before >= (1.9 if change > 0 else 9.8)


def test_bursts_right_after_a_fall() -> None:
    """The load waits until levels fall and then bursts: each fall takes a calm time, so changes stay that rare."""
    sim = Sim([running("a", 0.01)])
    burst_until = 0.0
    for tick in range(6000):
        now = tick * 0.1
        if sim.changes and sim.changes[-1][1] < 0 and now > burst_until + 0.5:
            burst_until = now + 0.3
        busy = tick < 100 or now < burst_until
        sim.step(now, used=900 if busy else 100, ttft_seconds=9.0 if busy else None)
    falls = sum(change < 0 for _, change in sim.changes)
    rises = len(sim.changes) - falls
    assert falls <= 2 * 600 / CONFIG.calm_seconds
    assert rises <= 8 + falls


@pytest.mark.parametrize("jump", [-1e9, -5.0, 5.0, 1e9])
def test_clock_jumps_do_no_harm(jump: float) -> None:
    sim = Sim([running("a", 0.01)])
    for tick in range(2000):
        sim.step(tick * 0.1 + (jump if tick % 120 > 60 else 0.0), ttft_seconds=9.0 if tick < 200 else None)
        if tick == 199:
            assert sim.new[True] == 8
    assert sim.new[True] == 0
    assert sim.summaries["a"].level == 8


def test_tiny_requests_and_those_at_their_top_are_left_alone() -> None:
    tiny = [running(f"t{i}", -1e-4, prefill=-1e-3, saving=-10) for i in range(20)]
    top = [running(f"m{i}", 0.1, level=8) for i in range(20)]
    barred = [running(f"b{i}", 0.1, max_level=0) for i in range(20)]
    sim = Sim(tiny + top + barred)
    for tick in range(200):
        sim.step(tick * 0.1, used=1000, ttft_seconds=99.0, itl_seconds=9.0)
    assert {s.id: s.level for s in sim.summaries.values()} == {s.id: s.level for s in tiny + top + barred}
    assert len(sim.changes) == 8


def test_random_loads_change_new_levels_rarely_and_running_ones_never_down() -> None:
    generator = random.Random(3)
    sim = Sim([running(f"r{i}", generator.uniform(-0.01, 0.02)) for i in range(6)])
    for tick in range(5000):
        sim.step(
            tick * 0.1,
            used=generator.randrange(1000),
            ttft_seconds=generator.choice([None, generator.expovariate(0.5)]),
            itl_seconds=generator.expovariate(20),
        )
    assert len(sim.changes) <= 8
    assert all(
        s.level == (8 if s.seconds_saved_per_layer > 0 or s.saving_per_layer > 0 else 0) for s in sim.summaries.values()
    )


latency = st.none() | st.floats(0, 100)
summary = st.builds(
    lambda a, b, saving, decode, prefill, fold, computed, prompt: RequestSummary(
        "", min(a, b), max(a, b), computed, saving, prompt, saving, 5, 20, decode, prefill, fold
    ),
    st.integers(0, 8), st.integers(0, 8), st.integers(-50, 200), st.floats(-0.1, 0.1), st.floats(-1, 1), st.floats(0, 0.1),
    st.sampled_from([0, 100]), st.integers(0, 900),
)  # fmt: skip
requests = st.lists(summary, max_size=8).map(lambda found: [replace(s, id=str(i)) for i, s in enumerate(found)])
moment = st.none() | st.floats(0, 30)
states = st.builds(PolicyState, moment, moment, moment, moment)


@given(
    st.tuples(st.integers(0, 1000), st.integers(0, 2000), latency, latency, latency),
    st.tuples(st.integers(0, 500), st.integers(0, 500), *[st.floats(0, 10)] * 3),
    requests, states, st.floats(0, 60), st.integers(0, 8), st.integers(0, 8),
)  # fmt: skip
def test_more_pressure_never_gives_lower_levels(
    less: tuple[int, int, float | None, float | None, float | None],
    more: tuple[int, int, float, float, float],
    summaries: list[RequestSummary],
    state: PolicyState,
    now: float,
    new_level: int,
    fast: int,
) -> None:
    def outcome(used: int, wanted: int, *latencies: float | None) -> dict[tuple[str | None, bool], int]:
        ttft, waiting, itl = latencies
        signals = replace(
            load(used, new_level, fast, ttft_seconds=ttft, waiting_seconds=waiting, itl_seconds=itl),
            wanted_bytes=wanted,
        )
        _, decisions = decide(state, signals, summaries, now, CONFIG)
        levels: dict[tuple[str | None, bool], int] = {(s.id, False): s.level for s in summaries}
        levels |= {(None, False): new_level, (None, True): fast}
        return levels | {(d.request_id, d.request_id is None and d.min_gain is not None): d.level for d in decisions}

    raised = [value if extra == 0 else (value or 0) + extra for value, extra in zip(less, more, strict=True)]
    low, high = outcome(*less), outcome(*raised)  # type: ignore[arg-type]
    assert all(high[name] >= level for name, level in low.items())


@given(
    st.integers(0, 3000), latency, latency, latency, requests, states, st.floats(-10, 60), st.integers(0, 8),
    st.integers(0, 8),
)  # fmt: skip
def test_decisions_are_always_legal(
    used: int,
    ttft: float | None,
    waiting: float | None,
    itl: float | None,
    summaries: list[RequestSummary],
    state: PolicyState,
    now: float,
    new_level: int,
    fast: int,
) -> None:
    signals = load(used, new_level, fast, ttft_seconds=ttft, waiting_seconds=waiting, itl_seconds=itl)
    first = decide(state, signals, summaries, now, CONFIG)
    assert first == decide(state, signals, summaries, now, CONFIG)
    names = [(d.request_id, d.request_id is None and d.min_gain is not None) for d in first[1]]
    assert len(names) == len(set(names))
    by_name = {s.id: s for s in summaries}
    for decision in first[1]:
        if decision.request_id is None:
            assert 0 <= decision.level <= MAX_LEVEL
            continue
        found = by_name[decision.request_id]
        assert (decision.min_gain is not None) == (decision.reason == "latency pressure")
        assert found.level < decision.level <= found.max_level
        if decision.reason == "latency pressure":
            assert found.seconds_saved_per_layer > 0
        else:
            assert found.saving_per_layer > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"ttft_seconds": 0.0}, {"tpot_seconds": -1.0}, {"ttft_seconds": math.inf}, {"tpot_seconds": math.nan},
        {"latency_low": 0.0}, {"latency_low": 1.1}, {"latency_cooldown_seconds": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PolicyConfig(**settings)
