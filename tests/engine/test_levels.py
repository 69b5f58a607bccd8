"""Levels of running requests: by hand, by policy, for lack of memory, at any moment, in any company."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dsla.engine import Decision, RequestSummary, SamplingParams, Signals
from dsla.mixers import DslaConfig
from tests.engine.tiny import ORDER, assert_as_reference, no_policy, random_prompt, tiny_decoder, tiny_engine

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = {name: random_prompt(n, seed) for seed, (name, n) in enumerate({"a": 1, "b": 7, "c": 23, "d": 40}.items())}


def test_adapter_that_is_not_foldable_converts_new_requests_only() -> None:
    engine = tiny_engine(decoder=tiny_decoder(DslaConfig(gate_source="hidden", window=0, sinks=0)))
    engine.add_request(PROMPTS["c"], GREEDY, request_id="old")
    engine.step()
    engine.set_level(2)
    engine.step()
    engine.add_request(PROMPTS["c"], GREEDY, request_id="new")
    engine.run()
    assert engine.final["old"].levels == [[0, 0]]
    assert engine.final["new"].levels == [[0, 2]]
    assert [event["reason"] for event in engine.stats()["events"] if event["kind"] == "defer"] == [
        "adapter not foldable"
    ]


def test_policy_over_an_adapter_that_is_not_foldable() -> None:
    """New requests get the policy's level, running ones keep theirs whatever it says, and all are as the reference."""

    def restless(
        state: object, signals: Signals, summaries: Sequence[RequestSummary], now: float
    ) -> tuple[object, list[Decision]]:
        wanted = len(summaries) % 4
        return state, [Decision(name, wanted, "test") for name in (None, *(summary.id for summary in summaries))]

    decoder = tiny_decoder(DslaConfig(gate_source="hidden", window=0, sinks=0))
    engine = tiny_engine(decoder=decoder, policy=restless, max_step_tokens=6)
    prompts = {str(n): random_prompt(9 + n, n) for n in range(7)}
    for name, prompt in prompts.items():
        engine.add_request(prompt, GREEDY, request_id=name)
        engine.step()
        engine.step()
    engine.run()
    histories = {name: engine.final[name].levels for name in prompts}
    assert all(len(levels) == 1 for levels in histories.values())
    assert len({levels[0][1] for levels in histories.values()}) > 2, "or the policy's levels reach nobody"
    for name, prompt in prompts.items():
        assert_as_reference(engine, name, prompt)


@pytest.mark.parametrize("step", range(1, 22))
def test_level_change_at_every_step(step: int) -> None:
    engine = tiny_engine()
    engine.set_level(0)
    for name in ("b", "c", "d"):
        engine.add_request(PROMPTS[name], GREEDY, request_id=name)
    for _ in range(step):
        engine.step()
    engine.set_level(1 + step % 3)
    engine.run()
    for name in ("b", "c", "d"):
        assert_as_reference(engine, name, PROMPTS[name])
        assert len(engine.final[name].levels) <= 2


@pytest.mark.parametrize("first", range(0, 13, 3))
def test_two_level_changes(first: int) -> None:
    engine = tiny_engine()
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c")
    for step in range(100):
        if step in (first, first + 4):
            engine.set_level(1 if step == first else 3)
        if not engine.has_work:
            break
        engine.step()
    levels = engine.final["c"].levels
    assert [level for _, level in levels] in ([0, 1, 3], [1, 3], [0, 1])
    assert_as_reference(engine, "c", PROMPTS["c"])


def test_history_has_one_entry_per_change_at_the_cached_token() -> None:
    engine = tiny_engine(max_step_tokens=16)
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c")
    engine.step()
    engine.set_level(1)
    engine.set_level(2)
    engine.step()
    engine.step()
    engine.set_level(3)
    engine.run()
    final = engine.final["c"]
    assert final.levels == [[0, 0], [16, 2], [24, 3]]
    assert final.folded_tokens == 2 * 16 + 24


def test_policy_starts_afresh_after_a_forced_level() -> None:
    def always_three(
        state: object, signals: Signals, summaries: Sequence[RequestSummary], now: float
    ) -> tuple[object, list[Decision]]:
        return "seen", [] if state else [Decision(None, 3, "burst")]

    engine = tiny_engine(policy=always_three)
    engine.add_request(PROMPTS["c"], GREEDY)
    engine.run()
    assert engine.stats()["new_level"] == 3
    engine.set_level(0)
    engine.set_level(None)
    assert engine.stats()["new_level"] == 0


def test_new_requests_start_at_the_forced_level_and_running_ones_never_fall() -> None:
    engine = tiny_engine()
    engine.set_level(2)
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c")
    engine.step()
    engine.set_level(0)
    engine.add_request(PROMPTS["b"], GREEDY, request_id="b")
    engine.run()
    assert engine.final["c"].levels == [[0, 2]]
    assert engine.final["b"].levels == [[0, 0]]


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"quality": "full"}, [[0, 0]]),
        ({"quality": "balanced"}, [[0, 0], [9, 1]]),
        ({"quality": "fast"}, [[0, 0], [9, 3]]),
        ({"max_level": 2}, [[0, 0], [9, 2]]),
        ({"min_level": 2}, [[0, 2], [9, 3]]),
    ],
    ids=str,
)
def test_bounds_of_a_request_hold(options: dict, levels: list[list[int]]) -> None:
    engine = tiny_engine()
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c", **options)
    engine.step()
    engine.set_level(3)
    engine.run()
    assert engine.final["c"].levels == levels
    assert_as_reference(engine, "c", PROMPTS["c"])


def test_page_freed_by_conversion_admits_a_waiting_request_in_the_next_step() -> None:
    engine = tiny_engine(units=126)
    engine.add_request(random_prompt(48), SamplingParams(max_tokens=10, ignore_eos=True), request_id="long")
    engine.add_request(random_prompt(8, 1), SamplingParams(max_tokens=5, ignore_eos=True), request_id="short")
    while len(engine.outputs.get("long", [])) < 8:
        engine.step()
    assert engine.stats()["waiting"] == 1
    free, slot = engine.arena.free_units, engine.arena.slot_units
    taken = 3 * engine.arena.page_count(8) + slot
    assert free < taken
    engine.set_level(1)
    engine.step()
    stats = engine.stats()
    assert stats["waiting"] == 0
    pages = engine.arena.page_count(48 + 8)
    assert engine.arena.free_units == free + pages - slot - taken
    assert {r["id"]: r["computed_tokens"] for r in stats["requests"]}["short"] > 0
    engine.run()
    assert_as_reference(engine, "long", random_prompt(48))
    assert_as_reference(engine, "short", random_prompt(8, 1))
    assert stats["conversions"] == {"by hand": 1}


def test_page_freed_by_conversion_lets_a_request_read_its_prompt_in_the_same_step() -> None:
    engine = tiny_engine(units=100, policy=no_policy)
    engine.add_request(random_prompt(45), SamplingParams(max_tokens=10, ignore_eos=True), request_id="long")
    while not engine.outputs.get("long"):
        engine.step()
    engine.add_request(random_prompt(8, 1), SamplingParams(max_tokens=5, ignore_eos=True), request_id="short")
    free, taken = engine.arena.free_units, 4 * engine.arena.page_count(8)
    assert free < taken
    engine.step()
    pages, slot = engine.arena.page_count(45), engine.arena.slot_units
    assert engine.arena.free_units == free + pages - slot - taken
    stats = engine.stats()
    assert {r["id"]: r["computed_tokens"] for r in stats["requests"]} == {"long": 46, "short": 8}
    assert stats["conversions"] == {"memory": 1}
    engine.run()
    assert_as_reference(engine, "long", random_prompt(45))
    assert_as_reference(engine, "short", random_prompt(8, 1))


def test_nan_in_a_cache_fails_its_fold_and_names_the_layer() -> None:
    engine = tiny_engine()
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c")
    engine.step()
    engine.arena.pages["v"][engine._requests["c"].memory.table(ORDER[1]).units[0]] = torch.inf
    engine.set_level(2)
    engine.run()
    assert engine.final["c"].finish_reason == "error"
    assert f"folding layer {ORDER[1]} gave non-finite" in engine.final["c"].error
    assert engine.arena.free_units == engine.arena.n_units


def test_short_requests_are_not_converted_by_memory_pressure() -> None:
    engine = tiny_engine(units=100, policy=no_policy)
    engine.add_request(random_prompt(45), SamplingParams(max_tokens=10, ignore_eos=True), request_id="long")
    for i in range(2):
        engine.add_request(random_prompt(3, i), SamplingParams(max_tokens=8, ignore_eos=True), request_id=f"short{i}")
    engine.run()
    assert engine.stats()["conversions"].keys() == {"memory"}
    assert engine.final["long"].levels[-1][1] > 0
    for i in range(2):
        assert engine.final[f"short{i}"].levels == [[0, 0]]
        assert_as_reference(engine, f"short{i}", random_prompt(3, i))


def test_layer_about_to_outgrow_its_slot_is_converted_before_its_pages_pay_for_it() -> None:
    engine = tiny_engine(units=80 + 45, policy=no_policy, max_step_tokens=14)
    engine.add_request(
        random_prompt(10, 1), SamplingParams(max_tokens=30, ignore_eos=True), request_id="old", quality="full"
    )
    while len(engine.outputs.get("old", [])) < 27:
        engine.step()
    engine.add_request(random_prompt(27), SamplingParams(max_tokens=4, ignore_eos=True), request_id="new")
    engine.run()
    assert engine.final["new"].levels[1][0] == 13
    assert engine.stats()["conversions"].keys() == {"memory"}
    assert_as_reference(engine, "old", random_prompt(10, 1))
    assert_as_reference(engine, "new", random_prompt(27))


def test_relief_converts_no_more_than_it_must() -> None:
    engine = tiny_engine(units=4 * 25, policy=no_policy)
    engine.add_request(random_prompt(45), SamplingParams(max_tokens=10, ignore_eos=True), request_id="x")
    engine.run()
    assert [level for _, level in engine.final["x"].levels] == [0, 1]
    assert engine.final["x"].levels[1][0] == 50
    assert_as_reference(engine, "x", random_prompt(45))


def test_accepted_request_runs_though_the_level_was_forced_down_meanwhile() -> None:
    engine = tiny_engine(units=110, policy=no_policy)
    engine.add_request(random_prompt(45), SamplingParams(max_tokens=6, ignore_eos=True), request_id="first")
    engine.step()
    engine.add_request(random_prompt(60, 1), SamplingParams(max_tokens=10, ignore_eos=True), request_id="second")
    engine.set_level(0)
    engine.run()
    assert engine.final["first"].levels == [[0, 0]]
    assert engine.final["second"].levels == [[0, 2]]
    assert_as_reference(engine, "second", random_prompt(60, 1))


def test_forced_level_waits_for_memory_instead_of_overdrawing() -> None:
    engine = tiny_engine(units=4 * 6 + 3)
    engine.add_request(random_prompt(4), SamplingParams(max_tokens=9, ignore_eos=True), request_id="x")
    engine.step()
    engine.set_level(3)
    engine.run()
    assert engine.final["x"].levels == [[0, 0]]
    assert any(event["kind"] == "defer" for event in engine.stats()["events"])
    assert_as_reference(engine, "x", random_prompt(4))


@pytest.mark.parametrize(("units", "level"), [(27, 2), (20, 1), (15, 0)])
def test_level_forced_above_what_the_budget_holds_starts_at_the_nearest_one(units: int, level: int) -> None:
    engine = tiny_engine(units=units)
    engine.add_request(random_prompt(4), SamplingParams(max_tokens=3, ignore_eos=True), request_id="x")
    engine.set_level(3)
    engine.run(limit=20)
    assert engine.final["x"].levels == [[0, level]]
    assert_as_reference(engine, "x", random_prompt(4))
