"""A request's tokens depend on its prompt, its level history and its seed, and on nothing else that happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsla.engine import EngineConfig, SamplingParams
from dsla.errors import BusyError, EngineError, RequestError
from dsla.mixers import DslaConfig
from tests.engine.tiny import ORDER, FakeClock, assert_as_reference, random_prompt, tiny_decoder, tiny_engine

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = {name: random_prompt(n, seed) for seed, (name, n) in enumerate({"a": 1, "b": 7, "c": 23, "d": 40}.items())}


@pytest.mark.parametrize("level", range(len(ORDER) + 1))
@pytest.mark.parametrize("max_step_tokens", [9, 16, 512])
def test_batched_and_chunked_as_reference(level: int, max_step_tokens: int) -> None:
    engine = tiny_engine(level=level, max_step_tokens=max_step_tokens)
    for name, prompt in PROMPTS.items():
        engine.add_request(prompt, GREEDY, request_id=name)
    engine.run()
    for name, prompt in PROMPTS.items():
        assert_as_reference(engine, name, prompt)
        assert len(engine.outputs[name]) == 12
        assert engine.final[name].levels == [[0, level]]
        assert engine.final[name].finish_reason == "length"
    assert engine.arena.free_units == engine.arena.n_units


@pytest.mark.parametrize(
    "settings",
    [
        {"n_states": 1, "window": 0, "sinks": 0, "normalizer": "state", "feature_map": "elu", "gate_shape": "vector"},
        {"n_states": 4, "window": 3, "sinks": 0, "normalizer": "state", "mixing": "head", "delta_rank": 0},
        {"window": 0, "sinks": 3, "feature_map": "softmax", "mixing": "layer"},
        {
            "window": 0, "sinks": 0, "normalizer": "none", "feature_map": "identity", "gate_shape": "vector",
            "gate_source": "hidden", "rope": False,
        },
    ],
    ids=["one-state", "four-states", "sinks-only", "paper"],
)  # fmt: skip
def test_other_mixers_as_reference(settings: dict[str, Any]) -> None:
    engine = tiny_engine(decoder=tiny_decoder(DslaConfig(**settings)), level=2)
    for name, prompt in PROMPTS.items():
        engine.add_request(prompt, GREEDY, request_id=name)
    for _ in range(5):
        engine.step()
    engine.set_level(3)
    engine.run()
    for name, prompt in PROMPTS.items():
        assert_as_reference(engine, name, prompt)


def test_alone_as_batched() -> None:
    together = tiny_engine(level=2)
    for name, prompt in PROMPTS.items():
        together.add_request(prompt, GREEDY, request_id=name)
    together.run()
    for name, prompt in PROMPTS.items():
        alone = tiny_engine(level=2, max_step_tokens=64)
        alone.add_request(prompt, GREEDY, request_id=name)
        alone.run()
        assert alone.outputs[name] == together.outputs[name]
        assert (torch.stack(alone.logits[name]) - torch.stack(together.logits[name])).abs().max() <= 1e-10


@pytest.mark.parametrize("step", [0, 1, 3, 6, 10])
def test_cancellation_frees_at_once_and_leaves_others_alone(step: int) -> None:
    engine = tiny_engine(level=1)
    for name in ("b", "c", "d"):
        engine.add_request(PROMPTS[name], GREEDY, request_id=name)
    for _ in range(step):
        engine.step()
    used = engine.arena.n_units - engine.arena.free_units
    assert engine.cancel("c")
    assert not engine.cancel("c")
    assert step < 4 or engine.arena.n_units - engine.arena.free_units < used
    engine.run()
    assert engine.final["c"].finish_reason == "abort"
    for name in ("b", "d"):
        assert_as_reference(engine, name, PROMPTS[name])
    assert engine.arena.free_units == engine.arena.n_units


def test_request_that_can_never_fit_is_refused_with_the_budget_it_needs() -> None:
    engine = tiny_engine(units=100)
    page = engine.arena.page_bytes
    with pytest.raises(EngineError, match=f"needs {4 * 30 * page:,} bytes; the memory budget is {100 * page:,}"):
        engine.add_request(random_prompt(50), SamplingParams(max_tokens=11), request_id="x")
    assert not engine.has_work


@pytest.mark.parametrize(
    ("units", "prompt", "config", "expected"),
    [
        (1000, 5, {"open_ended_tokens": 30}, 30),
        (1000, 505, {"level": 3}, 7),
        (4 * 20, 5, {}, 2 * 20 - 5),
        (4 * 20, 5, {"open_ended_tokens": 30}, 30),
        (4 * 3, 6, {}, 1),
    ],
    ids=["default", "context", "budget", "default-within-budget", "one-token"],
)
def test_request_without_max_tokens_gets_a_stated_reserve(
    units: int, prompt: int, config: dict[str, int], expected: int
) -> None:
    engine = tiny_engine(units=units, max_step_tokens=64, **config)
    engine.add_request(random_prompt(prompt), SamplingParams(max_tokens=None, ignore_eos=True), request_id="x")
    engine.run()
    assert engine.final["x"].finish_reason == "length"
    assert len(engine.outputs["x"]) == expected
    assert_as_reference(engine, "x", random_prompt(prompt))


def test_request_without_max_tokens_is_refused_where_not_even_one_fits() -> None:
    engine = tiny_engine(units=4 * 3)
    with pytest.raises(EngineError, match="7 prompt tokens and up to 1 new ones"):
        engine.add_request(random_prompt(7), SamplingParams(max_tokens=None))


def test_open_ended_requests_run_side_by_side() -> None:
    engine = tiny_engine(units=8 * 4 * 10, open_ended_tokens=16)
    for i in range(8):
        engine.add_request(random_prompt(5, i), SamplingParams(max_tokens=None, ignore_eos=True), request_id=str(i))
    engine.step()
    assert engine.stats()["running"] == 8
    engine.run()
    for i in range(8):
        assert_as_reference(engine, str(i), random_prompt(5, i))


@pytest.mark.parametrize("max_step_tokens", [2, 3])
def test_few_step_tokens_limit_how_many_run_at_once(max_step_tokens: int) -> None:
    engine = tiny_engine(max_step_tokens=max_step_tokens, max_running=64)
    assert engine.config.max_running == max_step_tokens - 1
    for name, prompt in PROMPTS.items():
        engine.add_request(prompt, GREEDY, request_id=name)
    engine.run()
    for name, prompt in PROMPTS.items():
        assert_as_reference(engine, name, prompt)


@pytest.mark.parametrize(("name", "value"), [("max_step_tokens", 1), ("max_running", 0), ("open_ended_tokens", 0)])
def test_bad_settings_are_named(name: str, value: int) -> None:
    with pytest.raises(EngineError, match=f"{name} must be at least {value + 1}, found {value}"):
        EngineConfig(**{name: value})


def test_nan_fails_one_request_and_names_it() -> None:
    engine = tiny_engine(level=1)
    engine.add_request(PROMPTS["b"], GREEDY, request_id="b")
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c")
    for _ in range(5):
        engine.step()
    engine.arena.slots["states"][engine._requests["b"].memory.slot(ORDER[0])] = torch.nan
    engine.run()
    assert engine.final["b"].finish_reason == "error"
    assert "request 'b': logits are not finite" in engine.final["b"].error
    assert f"what layer {ORDER[0]} remembers is the first that is not finite" in engine.final["b"].error
    assert engine.final["c"].finish_reason == "length"
    assert_as_reference(engine, "c", PROMPTS["c"])
    assert engine.arena.free_units == engine.arena.n_units


def test_end_tokens_stop_and_are_not_part_of_the_output() -> None:
    engine = tiny_engine()
    engine.add_request(PROMPTS["c"], GREEDY, request_id="free")
    engine.run()
    third = engine.outputs["free"][2]
    first = engine.outputs["free"].index(third)
    engine.add_request(
        PROMPTS["c"], SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(third,)), request_id="stops"
    )
    engine.run()
    assert engine.outputs["stops"] == engine.outputs["free"][:first]
    assert engine.final["stops"].finish_reason == "stop"
    assert engine.final["stops"].completion_tokens == first


def test_seeded_sampling_does_not_depend_on_the_batch() -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True)
    outputs = []
    for others in ((), ("b", "d")):
        engine = tiny_engine(level=1)
        for name in others:
            engine.add_request(PROMPTS[name], GREEDY, request_id=name)
        engine.add_request(PROMPTS["c"], params, request_id="c")
        engine.run()
        outputs.append(engine.outputs["c"])
    assert outputs[0] == outputs[1]
    engine.add_request(
        PROMPTS["c"], SamplingParams(max_tokens=20, temperature=0.8, seed=6, ignore_eos=True), request_id="other"
    )
    engine.run()
    assert engine.outputs["other"] != outputs[0]


@pytest.mark.parametrize(
    ("prompt", "params", "options", "message"),
    [
        ([], GREEDY, {}, "no tokens"),
        ([3, 61], GREEDY, {}, "token id 61, the model knows 0 to 60"),
        ([1] * 512, GREEDY, {}, "512 tokens, the model's context of 512 leaves no room"),
        ([1] * 505, GREEDY, {}, "lower max_tokens to 7"),
        ([1], GREEDY, {"quality": "best"}, "quality must be one of full, balanced, fast, found 'best'"),
        ([1], GREEDY, {"quality": "full", "max_level": 1}, "not both"),
        ([1], GREEDY, {"max_level": 4}, "max_level must be in 0 ... 3"),
        ([1], GREEDY, {"min_level": 2, "max_level": 1}, "min_level 2 is above"),
    ],
)
def test_bad_requests(prompt: list[int], params: SamplingParams, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_engine().add_request(prompt, params, **options)


def test_bad_levels_and_ids() -> None:
    engine = tiny_engine()
    with pytest.raises(EngineError, match="level 4 is out of range: this model has levels 0 to 3"):
        engine.set_level(4)
    with pytest.raises(EngineError, match="no policy"):
        engine.set_level(None)
    engine.add_request([1], GREEDY, request_id="x")
    with pytest.raises(EngineError, match="'x' is open already"):
        engine.add_request([1], GREEDY, request_id="x")


def test_decoder_says_what_it_is() -> None:
    decoder = tiny_decoder()
    assert decoder.order == ORDER
    assert decoder.foldable
    assert decoder.eos_token_ids == {60}


def test_full_queue_refuses_and_goes_on() -> None:
    engine = tiny_engine(max_running=1, max_waiting=2)
    for name in ("b", "c"):
        engine.add_request(PROMPTS[name], GREEDY, request_id=name)
    with pytest.raises(BusyError, match="2 requests wait already"):
        engine.add_request(PROMPTS["d"], GREEDY)
    engine.step()
    engine.add_request(PROMPTS["d"], GREEDY, request_id="d")
    engine.run()
    for name in ("b", "c", "d"):
        assert_as_reference(engine, name, PROMPTS[name])


def test_a_request_that_was_checked_is_accepted_however_full_the_queue_has_become() -> None:
    engine = tiny_engine(max_waiting=1)
    checked = engine.check_request(PROMPTS["b"], GREEDY, request_id="b")
    engine.add_request(PROMPTS["c"], GREEDY, request_id="c")
    engine.submit(checked)
    engine.run()
    for name in ("b", "c"):
        assert_as_reference(engine, name, PROMPTS[name])


def test_a_request_ended_by_its_reader_leaves_what_one_ended_by_a_token_does() -> None:
    engine = tiny_engine()
    engine.add_request(PROMPTS["b"], SamplingParams(max_tokens=50, ignore_eos=True), request_id="b")
    assert not engine.finish("b"), "it has no tokens"
    for _ in range(4):
        engine.step()
    assert engine.finish("b") and not engine.finish("b")
    assert [output.finish_reason for output in engine.step()] == ["stop"]
    stats = engine.stats()
    assert (stats["finished"], stats["requests"], stats["snapshots"] > 0) == ({"stop": 1}, [], True)
    assert sum(stats["times"]["e2e"]["counts"]) == 1
    assert not engine.has_work


@pytest.mark.parametrize(("units", "level", "least"), [(3, None, 4), (20, 2, 22)])
def test_budget_that_holds_no_request_is_refused_with_the_least_that_does(
    units: int, level: int | None, least: int
) -> None:
    page = tiny_engine().arena.page_bytes
    with pytest.raises(EngineError, match=f"give at least {least * page:,}"):
        tiny_engine(units=units, level=level)
    tiny_engine(units=least, level=level)


def test_stats_tell_ages_and_recent_latencies() -> None:
    clock = FakeClock()
    engine = tiny_engine(clock=clock)
    clock.now = 100.0
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    assert engine.stats()["ttft_seconds"] is None
    for seconds in (2.0, 0.5, 0.25):
        clock.now += seconds
        engine.step()
    stats = engine.stats()
    assert (stats["now"], stats["requests"][0]["age_seconds"]) == (102.75, 2.75)
    assert stats["ttft_seconds"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert stats["itl_seconds"] == {"p50": 0.25, "p90": 0.5, "p99": 0.5}
