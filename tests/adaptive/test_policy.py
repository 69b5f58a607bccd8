"""The policy as a pure function of load and a fake clock, and inside an engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsla.adaptive import PolicyConfig, PolicyState, decide, make_policy
from dsla.engine import Decision, RequestSummary, SamplingParams, Signals
from dsla.errors import ConfigError
from tests.engine.tiny import PAGE_TOKENS, assert_as_reference, random_prompt, tiny_engine

CONFIG = PolicyConfig(
    high_water=0.8, low_water=0.4, cooldown_seconds=1.0, calm_seconds=10.0, new_level_step=0.25, long_share=0.5
)


def load(used: int, wanted: int = 0, new_level: int = 0, max_level: int = 8) -> Signals:
    return Signals(
        budget_bytes=1000, kv_bytes=used, state_bytes=0, wanted_bytes=wanted, new_level=new_level, max_level=max_level,
    )  # fmt: skip


def running(
    name: str, saving: int, level: int = 0, max_level: int = 8, computed: int = 100, prompt: int = 0
) -> RequestSummary:
    return RequestSummary(
        id=name, level=level, max_level=max_level, computed_tokens=computed, saving_per_layer=saving,
        prompt_bytes=prompt, prompt_saving_per_layer=saving,
    )  # fmt: skip


def test_calm_load_changes_nothing() -> None:
    _, decisions = decide(None, load(100), [running("a", 10)], 0.0, CONFIG)
    assert decisions == []


def test_pressure_converts_down_to_the_middle_and_raises_new_requests() -> None:
    _, decisions = decide(None, load(700, wanted=150), [running("a", 50)], 0.0, CONFIG)
    assert decisions == [Decision("a", 5, "memory pressure"), Decision(None, 2, "memory pressure")]


def test_long_requests_give_first_and_the_burden_is_shared() -> None:
    _, decisions = decide(None, load(850), [running("short", 20), running("long", 60)], 0.0, CONFIG)
    levels = {decision.request_id: decision.level for decision in decisions}
    assert levels["long"] > levels.get("short", 0) >= 1
    freed = 60 * levels["long"] + 20 * levels["short"]
    assert 250 <= freed < 250 + 60


def test_floors_and_break_even_hold() -> None:
    summaries = [
        running("capped", 50, level=1, max_level=2),
        running("full", 500, max_level=0),
        running("young", -5),
        running("even", 0),
    ]
    _, decisions = decide(None, load(1000), summaries, 0.0, CONFIG)
    assert {d.request_id: d.level for d in decisions if d.request_id} == {"capped": 2}


def test_cooldown_between_rounds() -> None:
    state, first = decide(None, load(900), [running("a", 10)], 0.0, CONFIG)
    state, second = decide(state, load(900, new_level=2), [running("a", 10)], 0.5, CONFIG)
    state, third = decide(state, load(900, new_level=2), [running("a", 10)], 1.0, CONFIG)
    assert first and third and not second


def test_a_step_that_would_not_fit_does_not_wait_for_the_cooldown() -> None:
    state, _ = decide(None, load(900), [running("a", 10)], 0.0, CONFIG)
    state, held = decide(state, load(900, wanted=100, new_level=2), [running("a", 10)], 0.1, CONFIG)
    state, acted = decide(state, load(900, wanted=101, new_level=2), [running("a", 10)], 0.2, CONFIG)
    assert acted and not held


def test_new_requests_wait_for_the_cooldown_whatever_running_ones_must_do() -> None:
    state, new_level, found = PolicyState(), 0, []
    for tenth in range(30):
        state, decisions = decide(state, load(1001, new_level=new_level), [running("a", 10)], tenth / 10, CONFIG)
        assert [decision for decision in decisions if decision.request_id], "running ones do not wait"
        for decision in decisions:
            if decision.request_id is None:
                new_level = decision.level
                found.append((tenth, new_level))
    assert found == [(0, 2), (10, 4), (20, 6)]


def test_nothing_to_convert_does_not_start_a_cooldown() -> None:
    state, decisions = decide(None, load(900, new_level=8), [], 0.0, CONFIG)
    assert decisions == [] and state.raised is None


def test_new_requests_come_back_to_level_0_step_by_step() -> None:
    state, level, falls = None, 8, []
    for now in range(100):
        state, decisions = decide(state, load(100, new_level=level), [], float(now), CONFIG)
        for decision in decisions:
            assert decision.reason == "pressure gone"
            level = decision.level
            falls.append((now, level))
    assert falls == [(10, 6), (20, 4), (30, 2), (40, 0)]


def test_calm_times_that_nobody_watched_count() -> None:
    state, decisions = decide(None, load(0, new_level=8), [], 0.0, CONFIG)
    assert decisions == []
    state, decisions = decide(state, load(0, new_level=8), [], 29.0, CONFIG)
    assert decisions == [Decision(None, 4, "pressure gone")]
    state, decisions = decide(state, load(0, new_level=4), [], 30.0, CONFIG)
    assert decisions == [Decision(None, 2, "pressure gone")]
    _, decisions = decide(state, load(0, new_level=2), [], 1e9, CONFIG)
    assert decisions == [Decision(None, 0, "pressure gone")]


@pytest.mark.parametrize(("idle", "level"), [(4.9, 3), (5.0, 2), (3600.0, 0)])
def test_idle_engine_returns_to_full_attention(idle: float, level: int) -> None:
    now = 0.0
    engine = tiny_engine(units=200, policy=make_policy(PolicyConfig(cooldown_seconds=0.0)), clock=lambda: now)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    engine.add_request(random_prompt(82), params, quality="full")
    while engine.has_work:
        now += 1.0
        engine.step()
    assert engine.stats()["new_level"] == 3
    now += idle
    engine.add_request(random_prompt(30, 5), params, request_id="next")
    engine.run()
    assert engine.final["next"].levels[0] == [0, level]


def test_between_the_marks_nothing_changes() -> None:
    state = PolicyState(raised=0.0, calm_since=0.0)
    for used, now in itertools.product((400, 600, 800), range(100)):
        state, decisions = decide(state, load(used, new_level=4), [running("a", 10)], float(now), CONFIG)
        assert decisions == []
    _, decisions = decide(state, load(399, new_level=4), [running("a", 10)], 100.0, CONFIG)
    assert decisions == []


def test_oscillating_load_does_not_make_levels_swing() -> None:
    state, level, changes = None, 0, []
    for tick in range(2000):
        now = tick * 0.1
        used = 600 + int(290 * math.sin(now * 2 * math.pi / 4))
        state, decisions = decide(state, load(used, new_level=level), [], now, CONFIG)
        for decision in decisions:
            changes.append(decision.level - level)
            level = decision.level
    assert changes == [2, 2, 2, 2]
    assert level == 8


def test_long_prompt_starts_at_the_level_that_keeps_its_share() -> None:
    _, decisions = decide(None, load(0), [running("a", 100, computed=0, prompt=750)], 0.0, CONFIG)
    assert decisions == [Decision("a", 3, "long prompt")]
    _, decisions = decide(None, load(0), [running("a", 100, computed=0, prompt=500)], 0.0, CONFIG)
    assert decisions == []
    _, decisions = decide(None, load(0), [running("a", 100, computed=16, prompt=750)], 0.0, CONFIG)
    assert decisions == []


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_clock_jumps_do_no_harm(jump: float) -> None:
    state, level = None, 0
    for tick in range(600):
        now = tick * 0.1 + (jump if tick > 50 else 0)
        used = 900 if tick < 100 else 100
        state, decisions = decide(state, load(used, new_level=level), [], now, CONFIG)
        level = next((d.level for d in decisions if d.request_id is None), level)
        if tick == 99:
            assert level == 8
    assert level == 0


@given(
    used=st.integers(0, 1000),
    wanted=st.integers(0, 3000),
    requests=st.lists(
        st.tuples(st.integers(-50, 200), st.integers(0, 8), st.integers(0, 8), st.integers(0, 300)), max_size=8
    ),
    new_level=st.integers(0, 8),
)
def test_decisions_are_always_legal(
    used: int, wanted: int, requests: list[tuple[int, int, int, int]], new_level: int
) -> None:
    summaries = [
        running(str(i), saving, min(a, b), max(a, b), computed, prompt=900)
        for i, (saving, a, b, computed) in enumerate(requests)
    ]
    _, decisions = decide(None, load(used, wanted, new_level), summaries, 0.0, CONFIG)
    names = [decision.request_id for decision in decisions]
    assert len(names) == len(set(names))
    for decision in decisions:
        if decision.request_id is None:
            assert 0 <= decision.level <= 8
        else:
            summary = summaries[int(decision.request_id)]
            assert summary.level < decision.level <= summary.max_level
            assert summary.saving_per_layer > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"high_water": 0.5, "low_water": 0.6}, {"high_water": 1.2}, {"low_water": 0.0}, {"cooldown_seconds": -1.0},
        {"calm_seconds": -1.0}, {"new_level_step": 0.0}, {"long_share": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PolicyConfig(**settings)


def test_engine_under_load_converts_and_every_request_ends() -> None:
    engine = tiny_engine(
        units=200, policy=make_policy(PolicyConfig(cooldown_seconds=0.0, calm_seconds=0.0)), max_step_tokens=24
    )
    prompts = {f"r{i}": random_prompt(30 + i, i) for i in range(6)}
    for name, prompt in prompts.items():
        engine.add_request(prompt, SamplingParams(max_tokens=16, ignore_eos=True), request_id=name)
    engine.run()
    stats = engine.stats()
    assert stats["conversions"]["memory pressure"] > 0
    for name, prompt in prompts.items():
        assert engine.final[name].finish_reason == "length"
        assert_as_reference(engine, name, prompt)
    assert engine.arena.free_units == engine.arena.n_units


def test_levels_rise_as_memory_fills_and_not_before() -> None:
    engine = tiny_engine(
        units=260, policy=make_policy(PolicyConfig(cooldown_seconds=0.0, calm_seconds=0.0)), max_step_tokens=12
    )
    for i in range(6):
        engine.add_request(random_prompt(40, i), SamplingParams(max_tokens=16, ignore_eos=True), request_id=str(i))
    used, conversions = [0.0], [0]
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        used.append((stats["kv_bytes"] + stats["state_bytes"]) / stats["budget_bytes"])
        conversions.append(sum(stats["conversions"].values()))
    first = next(step for step, count in enumerate(conversions) if count)
    assert used[first - 1] > 0.75
    assert len(set(conversions)) > 3
    assert max(used) > 0.8
    assert engine.stats()["conversions"].keys() == {"memory pressure"}


def test_prompts_that_are_read_later_do_not_count_yet() -> None:
    seen: list[Signals] = []

    def watch(state: object, signals: Signals, summaries: Sequence[RequestSummary], now: float) -> tuple[object, list]:
        assert all(summary.saving_per_layer == 0 for summary in summaries if not summary.computed_tokens)
        seen.append(signals)
        return state, []

    engine = tiny_engine(policy=watch, max_step_tokens=12)
    for i in range(3):
        engine.add_request(random_prompt(40, i), SamplingParams(max_tokens=4, ignore_eos=True), request_id=str(i))
    engine.step()
    engine.step()
    pages = 12 // PAGE_TOKENS * engine.decoder.n_layers
    page = engine.arena.page_bytes
    # Asked before anything starts, after the requests have started, and in the second step.
    assert [signals.wanted_bytes for signals in seen] == [0, pages * page, pages * page]
    assert [signals.used_bytes for signals in seen] == [0, 0, pages * page]


@pytest.mark.parametrize(("beginning", "levels"), [([], [[0, 1]]), (random_prompt(5), [[0, 0], [5, 1]])])
@pytest.mark.parametrize("max_tokens", [None, 200], ids=["open-ended", "long-answer"])
def test_a_short_prompt_with_a_long_answer_is_no_long_prompt(
    max_tokens: int | None, beginning: list[int], levels: list[list[int]]
) -> None:
    engine = tiny_engine(units=300, policy=make_policy())
    engine.add_request(random_prompt(5), SamplingParams(max_tokens=max_tokens), request_id="chat")
    engine.step()
    assert engine.stats()["requests"][0]["levels"] == [[0, 0]]
    engine.cancel("chat")
    engine.add_request(beginning + random_prompt(85, 1), SamplingParams(max_tokens=5), request_id="long")
    engine.step()
    assert engine.stats()["requests"][0]["levels"] == levels
    assert engine.stats()["conversions"] == {"long prompt": 1}


def test_quality_full_is_never_converted() -> None:
    engine = tiny_engine(units=250, policy=make_policy(), max_step_tokens=24)
    for i in range(3):
        engine.add_request(
            random_prompt(30, i), SamplingParams(max_tokens=16, ignore_eos=True), request_id=str(i), quality="full"
        )
    engine.run()
    assert all(final.levels == [[0, 0]] for final in engine.final.values())
