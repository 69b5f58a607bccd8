"""Prompts that are read together: long ones hold nobody up, and nobody holds them up for ever."""

from __future__ import annotations

import pytest

from dsla.engine import SamplingParams
from dsla.engine.cost import CostModel
from tests.engine.tiny import RecordingEngine, assert_as_reference, random_prompt, tiny_engine

ANSWER = SamplingParams(max_tokens=3, ignore_eos=True)
LONG = random_prompt(200)


def read(engine: RecordingEngine, name: str) -> int:
    """Prompt tokens of a request that are computed."""
    request = engine._requests.get(name)
    return len(LONG) if request is None else request.computed


def steps_until(engine: RecordingEngine, name: str) -> int:
    """Steps until a request has its first token."""
    count = 0
    while not engine.outputs.get(name):
        engine.step()
        count += 1
        assert count < 200
    return count


@pytest.mark.parametrize("length", [3, 6, 20])
def test_a_short_prompt_does_not_wait_for_a_long_one(length: int) -> None:
    engine, prompt = tiny_engine(max_step_tokens=9), random_prompt(length, 1)
    engine.add_request(LONG, ANSWER, request_id="long")
    engine.step()
    engine.add_request(prompt, ANSWER, request_id="short")
    assert steps_until(engine, "short") == -(-length // 4), "half of a step's nine tokens are for it"
    assert not engine.outputs.get("long")
    engine.run()
    for name, its in (("short", prompt), ("long", LONG)):
        assert_as_reference(engine, name, its)


def test_a_long_prompt_keeps_half_of_each_step_whatever_comes() -> None:
    engine = tiny_engine(max_step_tokens=9, max_running=4)
    engine.add_request(LONG, ANSWER, request_id="long")
    for step in range(40):
        before = read(engine, "long")
        engine.add_request(random_prompt(30, step), SamplingParams(max_tokens=1, ignore_eos=True))
        engine.step()
        assert read(engine, "long") - before >= 5 or "long" in engine.outputs
    assert "long" in engine.outputs


def test_prompts_with_as_much_left_are_read_one_after_the_other() -> None:
    engine = tiny_engine(max_step_tokens=9)
    for name in ("first", "second"):
        engine.add_request(random_prompt(40, len(name)), ANSWER, request_id=name)
    while not engine.outputs.get("first"):
        engine.step()
    assert engine._requests["second"].computed <= 9


def test_the_shortest_goes_first_and_nothing_of_a_step_is_left_unused() -> None:
    engine = tiny_engine(max_step_tokens=9)
    for name, length in (("long", 100), ("middle", 30), ("short", 2)):
        engine.add_request(random_prompt(length, length), ANSWER, request_id=name)
    engine.step()
    assert {name: read(engine, name) for name in ("long", "middle", "short")} == {"long": 5, "middle": 2, "short": 2}
    engine.step()
    assert sum(read(engine, name) for name in ("long", "middle", "short")) == 18


def test_where_decodes_take_all_the_time_the_least_that_is_read_is_shared() -> None:
    cost = CostModel(1.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    engine = tiny_engine(max_step_tokens=64, max_step_seconds=0.5, cost=cost, clock=lambda: 0.0)
    engine.add_request(LONG, ANSWER, request_id="long")
    engine.add_request(random_prompt(20, 1), ANSWER, request_id="short")
    engine.step()
    assert (read(engine, "long"), read(engine, "short")) == (8, 8)
