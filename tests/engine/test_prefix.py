"""What is kept for requests that begin alike: when, how much, in which order it goes, and that nothing broken stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsla.engine import SamplingParams, StepOutput
from dsla.engine import engine as engine_module
from dsla.engine.intake import message_ends
from tests.engine.tiny import EOS, ORDER, RecordingEngine, assert_as_reference, no_policy, random_prompt, tiny_engine

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = random_prompt(90, 1)


def run(engine: RecordingEngine, name: str, prompt: list[int]) -> StepOutput:
    engine.add_request(prompt, GREEDY, request_id=name)
    engine.run()
    return engine.final[name]


def kept_counts(engine: RecordingEngine) -> list[int]:
    return sorted(len(snapshot.tokens) for snapshot in engine._cache._snapshots)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots from 16 tokens on."""
    monkeypatch.setattr(engine_module, "FIRST_SNAPSHOT", 16)


@pytest.mark.usefixtures("early")
def test_snapshots_at_doubling_distances_at_the_end_of_the_prompt_and_of_the_answer() -> None:
    engine = tiny_engine(level=2, max_step_tokens=9)
    run(engine, "a", LONG)
    # Chunks of nine tokens: the first ends at or after 32 and 64 (states cost more than 18 tokens of pages would save); the
    # last token of the answer is not computed.
    assert kept_counts(engine) == [36, 72, 90, 93]


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(("shared", "found"), [(18, 0), (35, 0), (36, 36), (71, 36), (80, 72), (90, 90)])
def test_the_longest_snapshot_that_fits_is_taken_and_stays_what_it_is(shared: int, found: int) -> None:
    engine = tiny_engine(level=2, max_step_tokens=9)
    run(engine, "a", LONG)
    other = LONG[:shared] + random_prompt(20, 2)
    other[shared] = (LONG + engine.outputs["a"])[shared] ^ 1
    assert run(engine, "b", other).cached_tokens == found
    assert_as_reference(engine, "b", other)
    # Those that went on from it have left it alone.
    assert run(engine, "again", LONG + engine.outputs["a"] + [5]).cached_tokens == 93
    assert_as_reference(engine, "again", LONG + engine.outputs["a"] + [5])


def test_above_level_0_some_message_ends_are_kept_too() -> None:
    """Of the first message and of the last two: others share instructions, a conversation, or all of it."""
    engine, prompt = tiny_engine(level=2, max_step_tokens=9), list(LONG)
    for end in (30, 50, 70, 86):
        prompt[end - 1] = EOS
    run(engine, "a", prompt)
    assert kept_counts(engine) == [30, 70, 86, 90, 93]
    others = {
        "same": (prompt, 86),
        "last": (prompt[:70] + random_prompt(9, 4), 70),
        "first": (prompt[:30] + LONG[40:], 30),
    }
    for name, (other, shared) in others.items():
        assert run(engine, name, other).cached_tokens == shared
        assert_as_reference(engine, name, other)
    level_0 = tiny_engine(level=0, max_step_tokens=9)
    run(level_0, "a", prompt)
    assert kept_counts(level_0) == [93]


@pytest.mark.parametrize(
    ("prompt", "least", "ends"),
    [
        ([1, 2], 0, ()),
        ([60, 1], 0, (1,)),
        ([1, 60], 0, ()),
        ([60, 1, 60, 60, 1, 60, 2], 0, (1, 4, 6)),
        ([60, 1, 60, 60, 1, 60, 60, 2], 3, (3, 6, 7)),
        ([60, 1, 60, 2], 4, ()),
    ],
)
def test_message_ends(prompt: list[int], least: int, ends: tuple[int, ...]) -> None:
    assert message_ends(prompt, frozenset({EOS}), least) == ends


def test_what_is_held_at_a_level_that_memory_does_not_bear_to_the_end_is_left_alone() -> None:
    engine = tiny_engine(units=34, policy=no_policy)
    first = random_prompt(6, 1)
    engine.add_request(first, SamplingParams(max_tokens=2, ignore_eos=True), request_id="a", min_level=2)
    engine.run()
    longer = first + engine.outputs["a"][:1] + random_prompt(5, 2)
    assert run(engine, "b", longer).finish_reason == "length"
    assert_as_reference(engine, "b", longer)


@pytest.mark.parametrize("level", [0, 2])
def test_a_request_that_was_sent_back_in_its_prompt_does_not_count_its_own_work_as_that_of_others(level: int) -> None:
    engine = tiny_engine(level=level, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    for _ in range(5):
        engine.step()
    engine._preempt(engine._requests["a"], 0.0)
    engine.run()
    assert engine.stats()["prompt_tokens"] == 90, "what it had computed was found again"
    assert engine.final["a"].cached_tokens == 0
    assert_as_reference(engine, "a", LONG)


def test_at_level_0_any_beginning_serves() -> None:
    engine = tiny_engine(level=0)
    run(engine, "a", LONG)
    assert len(engine._cache) == 1
    other = LONG[:37] + [LONG[37] ^ 1] + random_prompt(9, 3)
    assert run(engine, "b", other).cached_tokens == 37
    assert_as_reference(engine, "b", other)


def test_the_least_recently_used_goes_first_and_the_limit_holds() -> None:
    prompts = {name: random_prompt(40, seed) for seed, name in enumerate("abc")}
    engine = tiny_engine(level=0)
    run(engine, "a", prompts["a"])
    limit = 2 * engine.arena.kept_bytes + engine.arena.page_bytes
    engine = tiny_engine(level=0, cache_bytes=limit)
    run(engine, "a", prompts["a"])
    run(engine, "b", prompts["b"])
    assert run(engine, "a2", prompts["a"]).cached_tokens == 39
    run(engine, "c", prompts["c"])
    assert engine.arena.kept_bytes <= limit
    assert run(engine, "a3", prompts["a"]).cached_tokens == 39
    assert run(engine, "b2", prompts["b"]).cached_tokens == 0


def test_the_limit_holds_when_a_request_that_shared_a_snapshot_ends() -> None:
    engine = tiny_engine(level=0)
    run(engine, "a", LONG)
    limit = engine.arena.kept_bytes
    engine = tiny_engine(level=0, cache_bytes=limit)
    run(engine, "a", LONG)
    engine.add_request(LONG, GREEDY, request_id="b")
    engine.step()
    engine.add_request(random_prompt(60, 7), SamplingParams(max_tokens=2, ignore_eos=True), request_id="c")
    engine.run()
    assert engine.arena.kept_bytes <= limit


@pytest.mark.parametrize("level", [0, 2])
def test_what_made_a_request_fail_is_not_kept(level: int) -> None:
    """The next request with the same prompt computes it anew, and succeeds."""
    engine = tiny_engine(level=level, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    for _ in range(9):
        engine.step()
    spoil(engine, "a", level)
    engine.run()
    assert engine.final["a"].finish_reason == "error"
    assert len(engine._cache) == 0
    assert run(engine, "b", LONG).cached_tokens == 0
    assert_as_reference(engine, "b", LONG)


def within_its_prompt(level: int, spoilt: bool) -> RecordingEngine:
    """An engine whose request `a` has read 45 tokens of its prompt, with something in them that is not finite if `spoilt`."""
    engine = tiny_engine(level=level, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    for _ in range(5):
        engine.step()
    if spoilt:
        spoil(engine, "a", level)
    return engine


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("spoilt", [True, False])
def test_a_request_cancelled_in_its_prompt_leaves_only_what_is_sound(level: int, spoilt: bool) -> None:
    engine = within_its_prompt(level, spoilt)
    engine.cancel("a")
    assert run(engine, "b", LONG).cached_tokens == (0 if spoilt else 45)
    assert_as_reference(engine, "b", LONG)


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("spoilt", [True, False])
def test_a_request_sent_back_in_its_prompt_leaves_only_what_is_sound(level: int, spoilt: bool) -> None:
    engine = within_its_prompt(level, spoilt)
    engine._preempt(engine._requests["a"], 0.0)
    assert kept_counts(engine) == ([] if spoilt else [45])
    engine.run()
    assert engine.final["a"].finish_reason == "length", "what it computes again is sound"
    assert_as_reference(engine, "a", LONG)


@pytest.mark.usefixtures("early")
def test_what_is_kept_within_a_prompt_is_sound() -> None:
    """Another request that begins alike does not fail with the one whose states are broken."""
    engine = tiny_engine(level=2, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    for _ in range(3):
        engine.step()
    spoil(engine, "a", 2)
    engine.step()
    assert engine._requests["a"].computed == 36, "where it would be kept"
    other = LONG[:36] + random_prompt(20, 2)
    assert run(engine, "b", other).cached_tokens == 0
    assert engine.final["a"].finish_reason == "error" and engine.final["b"].finish_reason == "length"
    assert_as_reference(engine, "b", other)


@pytest.mark.parametrize("level", [0, 2])
def test_tokens_of_before_do_not_show_that_what_is_replayed_is_sound(level: int) -> None:
    engine = tiny_engine(level=level, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    while len(engine.outputs.get("a", [])) < 2:
        engine.step()
    engine._preempt(engine._requests["a"], 0.0)
    engine._cache.clear()
    for _ in range(5):
        engine.step()
    spoil(engine, "a", level)
    engine.cancel("a")
    assert kept_counts(engine) == []


def test_numbers_whose_sum_is_too_large_are_finite_nevertheless() -> None:
    engine = tiny_engine(level=0, max_step_tokens=9)
    engine.add_request(LONG, GREEDY, request_id="a")
    engine.step()
    memory: Any = engine._requests["a"].memory
    engine.arena.pages["v"][memory.table(0).units[0]] = torch.finfo(torch.float64).max
    assert memory.broken_layer(9) is None
    engine.arena.pages["v"][memory.table(1).units[0], 0, 0, 0] = -torch.inf
    assert memory.broken_layer(9) == 1


def spoil(engine: RecordingEngine, name: str, level: int) -> None:
    """Puts something that is no number into what a request remembers."""
    memory: Any = engine._requests[name].memory
    if level:
        engine.arena.slots["states"][memory.slot(ORDER[0])] = torch.nan
    else:
        engine.arena.pages["v"][memory.table(ORDER[0]).units[0]] = torch.nan
