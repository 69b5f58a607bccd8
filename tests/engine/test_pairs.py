"""Every pair of {chunking, prefix reuse, preemption, level change, cancellation, n > 1}: what one does, the other must bear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dsla.engine import SamplingParams
from tests.engine.schedules import happened
from tests.engine.tiny import FakeClock, RecordingEngine, assert_as_reference, random_prompt, slow_folds, tiny_engine

GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
LONG, SHORT = random_prompt(60, 1), random_prompt(7, 2)
SIBLINGS = {name: replace(GREEDY, temperature=1.5, seed=seed) for seed, name in enumerate(("a", "a.1", "a.2"))}
"""Each with a seed of its own: their texts differ, and so does what they write into the page they share."""


def make(**config: Any) -> RecordingEngine:
    return tiny_engine(**{"level": 0, **config})


def add_siblings(engine: RecordingEngine, prompt: list[int], *names: str, **options: Any) -> None:
    for name in names:
        sibling_of = None if name == names[0] else names[0]
        engine.add_request(prompt, SIBLINGS[name], request_id=name, sibling_of=sibling_of, **options)


def preempt(engine: RecordingEngine, name: str) -> None:
    engine._preempt(engine._requests[name], 0.0)


def steps(engine: RecordingEngine, count: int) -> None:
    for _ in range(count):
        engine.step()


def until(engine: RecordingEngine, ready: Callable[[], bool]) -> None:
    for _ in range(200):
        if ready():
            return
        engine.step()
    raise AssertionError("it never came to that")


def check(engine: RecordingEngine, prompts: dict[str, list[int]], **counts: int) -> None:
    """All requests are as the reference, all memory is back, and what the test is about has happened so often."""
    found = happened(engine)
    for name, prompt in prompts.items():
        assert_as_reference(engine, name, prompt, SIBLINGS.get(name) if "a.1" in prompts else None)
    assert {name: found[name.replace("_", " ")] for name in counts} == counts
    assert engine.arena.free_units == engine.arena.n_units
    engine._cache.clear()
    assert engine.arena.unused_units == engine.arena.n_units


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("max_step_tokens", [2, 7, 64])
def test_chunking_and_prefix_reuse(level: int, max_step_tokens: int) -> None:
    engine = make(level=level, max_step_tokens=max_step_tokens, max_running=1)
    engine.add_request(LONG, GREEDY, request_id="first")
    engine.run()
    second = LONG + engine.outputs["first"] + SHORT
    engine.add_request(second, GREEDY, request_id="second")
    engine.run()
    # The last token of an answer is never computed: nothing follows it.
    assert engine.final["second"].cached_tokens == len(LONG) + 9
    check(engine, {"first": LONG, "second": second}, prefix_hits=1)


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
@pytest.mark.parametrize("at", range(1, 14, 3))
def test_chunking_and_preemption(at: int, park_bytes: int) -> None:
    engine = make(level=1, max_step_tokens=9, park_bytes=park_bytes, cache_bytes=0)
    engine.add_request(LONG, GREEDY, request_id="a")
    engine.add_request(SHORT, GREEDY, request_id="b")
    steps(engine, at)
    preempt(engine, "a")
    engine.run()
    check(engine, {"a": LONG, "b": SHORT}, **{"parked" if park_bytes else "replayed": 1})


@pytest.mark.parametrize("at", range(1, 8))
def test_chunking_and_level_change_in_mid_prompt(at: int) -> None:
    engine = make(max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    steps(engine, at)
    assert engine._requests["a"].computed == 9 * at if at < 7 else True
    engine.set_level(3)
    engine.run()
    assert engine.final["a"].levels == [[0, 0], [min(9 * at, 60), 3]]
    check(engine, {"a": LONG}, conversions=3)


@pytest.mark.parametrize("at", range(1, 8, 2))
def test_chunking_and_cancellation_in_mid_prompt(at: int) -> None:
    engine = make(level=2, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    engine.add_request(SHORT, GREEDY, request_id="b")
    steps(engine, at)
    engine.cancel("a")
    assert engine.arena.state_bytes <= 2 * engine.arena.slot_units * engine.arena.page_bytes
    engine.run()
    check(engine, {"a": LONG, "b": SHORT}, cancelled=1)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("max_step_tokens", [9, 64])
def test_chunking_and_siblings(level: int, max_step_tokens: int) -> None:
    engine = make(level=level, max_step_tokens=max_step_tokens)
    add_siblings(engine, LONG, *SIBLINGS)
    engine.run()
    assert len({tuple(engine.outputs[name]) for name in SIBLINGS}) == 3
    assert engine.stats()["prompt_tokens"] == len(LONG)
    check(engine, {"a": LONG, "a.1": LONG, "a.2": LONG}, forked=2)


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
@pytest.mark.parametrize("level", range(4))
def test_prefix_reuse_and_preemption(level: int, park_bytes: int) -> None:
    engine = make(level=level, park_bytes=park_bytes)
    engine.add_request(LONG, GREEDY, request_id="first")
    engine.run()
    second = LONG + engine.outputs["first"] + SHORT
    engine.add_request(second, GREEDY, request_id="second")
    until(engine, lambda: len(engine.outputs.get("second", [])) == 4)
    preempt(engine, "second")
    engine.run()
    check(engine, {"first": LONG, "second": second}, prefix_hits=1)


@pytest.mark.parametrize(("held", "wanted"), [(0, 2), (1, 3), (2, 2)])
def test_prefix_reuse_and_level_change(held: int, wanted: int) -> None:
    engine = make(level=held)
    engine.add_request(LONG, GREEDY, request_id="first")
    engine.run()
    engine.set_level(wanted)
    second = LONG + engine.outputs["first"] + SHORT
    engine.add_request(second, GREEDY, request_id="second")
    engine.run()
    joins = len(LONG) + 9
    assert engine.final["second"].cached_tokens == joins
    assert engine.final["second"].levels == [[0, held], *([[joins, wanted]] if wanted > held else [])]
    assert engine.final["second"].folded_tokens == (wanted - held) * joins
    check(engine, {"first": LONG, "second": second}, prefix_hits=1)


def test_prefix_held_at_a_higher_level_than_the_forced_one_is_not_used() -> None:
    engine = make(level=2)
    engine.add_request(LONG, GREEDY, request_id="first")
    engine.run()
    engine.set_level(1)
    engine.add_request(LONG + SHORT, GREEDY, request_id="second")
    engine.run()
    assert engine.final["second"].levels == [[0, 1]]
    check(engine, {"first": LONG, "second": LONG + SHORT}, prefix_hits=0)


def test_level_change_of_a_request_leaves_the_prefix_it_shares_alone() -> None:
    engine = make()
    for name, prompt in (("a", LONG), ("b", LONG + SHORT), ("c", LONG + SHORT[::-1])):
        engine.add_request(prompt, GREEDY, request_id=name, max_level=3 if name == "b" else 0)
        until(engine, lambda name=name: name in engine.outputs)
    engine.set_level(3)
    engine.run()
    assert engine.final["b"].levels[-1][1] == 3
    check(engine, {"a": LONG, "b": LONG + SHORT, "c": LONG + SHORT[::-1]}, prefix_hits=2, conversions=3)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("cancelled", ["first", "second"])
def test_prefix_reuse_and_cancellation(cancelled: str, level: int) -> None:
    engine = make(level=level)
    engine.add_request(LONG, GREEDY, request_id="first")
    until(engine, lambda: "first" in engine.outputs)
    engine.add_request(LONG + SHORT, GREEDY, request_id="second")
    until(engine, lambda: "second" in engine.outputs)
    engine.cancel(cancelled)
    engine.run()
    engine.add_request(LONG + SHORT, GREEDY, request_id="third")
    engine.run()
    check(engine, {"first": LONG, "second": LONG + SHORT, "third": LONG + SHORT}, prefix_hits=2, cancelled=1)


@pytest.mark.parametrize("level", [0, 3])
def test_prefix_reuse_and_siblings(level: int) -> None:
    engine = make(level=level)
    engine.add_request(LONG, GREEDY, request_id="first")
    engine.run()
    second = LONG + engine.outputs["first"] + SHORT
    add_siblings(engine, second, "a", "a.1")
    engine.run()
    assert engine.stats()["prompt_tokens"] == len(LONG) + 1 + len(SHORT)
    assert engine.outputs["a"] != engine.outputs["a.1"]
    check(engine, {"first": LONG, "a": second, "a.1": second}, prefix_hits=2, forked=1)


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
@pytest.mark.parametrize("cache_bytes", [0, None], ids=["computed", "kept"])
@pytest.mark.parametrize("before", [1, 7, 12])
def test_preemption_and_level_change(before: int, cache_bytes: int | None, park_bytes: int) -> None:
    engine = make(max_step_tokens=16, park_bytes=park_bytes, cache_bytes=cache_bytes)
    engine.add_request(LONG, SamplingParams(max_tokens=16, ignore_eos=True), request_id="a")
    steps(engine, before)
    engine.set_level(1)
    steps(engine, 2)
    engine.set_level(3)
    until(engine, lambda: len(engine.outputs.get("a", [])) >= 12)
    before_preemption = list(engine._requests["a"].levels)
    preempt(engine, "a")
    engine.set_level(0)
    engine.run()
    assert engine.final["a"].levels == [list(entry) for entry in before_preemption]
    check(engine, {"a": LONG}, **{"parked" if park_bytes else "replayed": 1}, conversions=3)


def test_level_raised_while_a_request_replays_waits_for_the_end_of_its_history() -> None:
    engine = make(max_step_tokens=8, cache_bytes=0)
    engine.add_request(LONG, GREEDY, request_id="a")
    until(engine, lambda: len(engine.outputs.get("a", [])) == 5)
    preempt(engine, "a")
    steps(engine, 2)
    engine.set_level(2)
    engine.run()
    assert engine.final["a"].levels == [[0, 0], [64, 2]]
    check(engine, {"a": LONG}, replayed=1, conversions=2)


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
@pytest.mark.parametrize("when", ["waiting", "running again"])
def test_preemption_and_cancellation(when: str, park_bytes: int) -> None:
    engine = make(level=1, park_bytes=park_bytes)
    engine.add_request(LONG, GREEDY, request_id="a")
    engine.add_request(SHORT, GREEDY, request_id="b")
    until(engine, lambda: "a" in engine.outputs)
    preempt(engine, "a")
    if when == "running again":
        engine.step()
    engine.cancel("a")
    assert engine.parked_bytes == 0
    engine.run()
    check(engine, {"a": LONG, "b": SHORT}, cancelled=1, **{"parked" if park_bytes else "replayed": 1})


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
@pytest.mark.parametrize(("at", "preempted"), [(3, "a"), (7, "a"), (10, "a"), (8, "a.1"), (12, "a.1")])
def test_preemption_and_siblings(at: int, preempted: str, park_bytes: int) -> None:
    engine = make(level=2, park_bytes=park_bytes)
    add_siblings(engine, LONG, "a", "a.1")
    steps(engine, at)
    preempt(engine, preempted)
    engine.run()
    assert engine.outputs["a"] != engine.outputs["a.1"]
    check(engine, {"a": LONG, "a.1": LONG}, **{"parked" if park_bytes else "replayed": 1})


@pytest.mark.parametrize("converted", [0, 1, 2, 3])
def test_level_change_and_cancellation(converted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is cancelled on its way to level 3, which a slow fold makes a matter of three steps."""
    clock = FakeClock()
    engine = make(clock=clock, max_step_seconds=1.0)
    slow_folds(monkeypatch, clock, 0.4)
    for name in ("a", "b"):
        engine.add_request(LONG if name == "a" else SHORT, GREEDY, request_id=name)
    until(engine, lambda: "a" in engine.outputs)
    engine.set_level(3)
    until(engine, lambda: engine._requests["a"].level >= converted)
    assert engine._requests["a"].level == converted
    engine.cancel("a")
    engine.run()
    check(engine, {"a": LONG, "b": SHORT}, cancelled=1)


@pytest.mark.parametrize("at", [2, 7, 9])
def test_level_change_and_siblings(at: int) -> None:
    engine = make()
    add_siblings(engine, LONG, *SIBLINGS, max_level=3)
    steps(engine, at)
    engine.set_level(2)
    engine.run()
    assert {engine.final[name].levels[-1][1] for name in ("a", "a.1", "a.2")} == {2}
    check(engine, {"a": LONG, "a.1": LONG, "a.2": LONG}, forked=2)


@pytest.mark.parametrize("at", [2, 8])
@pytest.mark.parametrize("cancelled", ["a", "a.1"])
def test_cancellation_and_siblings(cancelled: str, at: int) -> None:
    engine = make(level=1)
    add_siblings(engine, LONG, *SIBLINGS)
    steps(engine, at)
    engine.cancel(cancelled)
    engine.run()
    check(engine, {"a": LONG, "a.1": LONG, "a.2": LONG}, cancelled=1)
