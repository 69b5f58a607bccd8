"""Constraints as the engine bears them: whatever happens to a request, its output is one that they allow, and the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsla.engine import SamplingParams
from dsla.errors import EngineError, RequestError
from tests.engine.tiny import EOS, RecordingEngine, assert_as_reference, random_prompt, tiny_engine

PROMPT = random_prompt(23, 2)
LEAST = 8


class Ladder:
    """Each token is less than 20 ids above the one before, modulo the vocabulary; the end comes after `LEAST` tokens."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit, self.seen = limit, list[int]()

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        assert list(output[: len(self.seen)]) == self.seen, "it is asked about another output"
        assert len(output) == len(self.seen) + bool(output), "it is asked once for each token"
        if len(output) == self.limit:
            raise EngineError("the ladder ends here")
        self.seen = list(output)
        last = output[-1] if output else 0
        mask = np.zeros(61, np.bool_)
        mask[[(last + step) % EOS for step in range(1, 20)]] = True
        mask[EOS] = len(output) >= LEAST
        return mask


def climbs(tokens: Sequence[int]) -> bool:
    return all(0 < (after - before) % EOS < 20 for before, after in zip([0, *tokens], tokens, strict=False))


SAMPLED = SamplingParams(max_tokens=14, temperature=1.5, seed=5, constraint=Ladder)
WISHES = {
    "greedy": replace(SAMPLED, temperature=0.0),
    "drawn": SAMPLED,
    "top-p": replace(SAMPLED, top_p=0.9, min_p=0.01),
    "top-k": replace(SAMPLED, top_k=50),
    "penalties": replace(SAMPLED, frequency_penalty=1.0, logit_bias={3: 100.0, EOS: 5.0}, logprobs=3),
}


@pytest.fixture(params=WISHES)
def params(request: pytest.FixtureRequest) -> SamplingParams:
    return WISHES[request.param]


def run(params: SamplingParams, disturb: Callable[[RecordingEngine], None] | None = None, **config: Any) -> list[int]:
    """Tokens of one request, `disturb`ed after each step."""
    engine = tiny_engine(**config)
    engine.add_request(PROMPT, params, request_id="r")
    while engine.has_work:
        engine.step()
        if disturb is not None and "r" in engine._requests:
            disturb(engine)
    assert_as_reference(engine, "r", PROMPT, params)
    return engine.outputs["r"]


@pytest.mark.parametrize("level", range(4))
def test_only_allowed_tokens_come(params: SamplingParams, level: int) -> None:
    tokens = run(params, level=level)
    assert climbs(tokens)
    assert LEAST <= len(tokens) <= 14


def test_it_ends_where_it_may() -> None:
    engine = tiny_engine()
    engine.add_request(PROMPT, replace(SAMPLED, logit_bias={EOS: 100.0}), request_id="r")
    engine.run()
    assert (len(engine.outputs["r"]), engine.final["r"].finish_reason) == (LEAST, "stop")


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
def test_preemption_changes_nothing(params: SamplingParams, park_bytes: int) -> None:
    places = [1, 5, 7]

    def preempt(engine: RecordingEngine) -> None:
        request = engine._requests["r"]
        if places and len(request.output) == places[0]:
            places.pop(0)
            engine._preempt(request, 0.0)

    expected = run(params, level=1)
    assert run(params, preempt, level=1, park_bytes=park_bytes, cache_bytes=0) == expected
    assert places == []


def test_answers_to_one_prompt_have_constraints_of_their_own() -> None:
    alone = []
    for seed in range(3):
        alone.append(run(replace(SAMPLED, seed=seed)))
    engine = tiny_engine(max_step_tokens=64)
    for seed in range(3):
        sibling_of = None if seed == 0 else "0"
        engine.add_request(PROMPT, replace(SAMPLED, seed=seed), request_id=str(seed), sibling_of=sibling_of)
    engine.run()
    assert [engine.outputs[str(seed)] for seed in range(3)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_logprobs_are_the_model_s_own() -> None:
    engine = tiny_engine()
    engine.add_request(PROMPT, replace(SAMPLED, logprobs=2), request_id="r")
    reports = []
    while engine.has_work:
        reports += [report for output in engine.step() for report in output.logprobs or ()]
    for token, report, logits in zip(engine.outputs["r"], reports, engine.logits["r"], strict=False):
        expected = logits.log_softmax(-1)
        assert report[0] == (token, pytest.approx(float(expected[token]), abs=1e-12))
        assert [entry[0] for entry in report[1:]] == expected.topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (lambda: Ladder(5), "the ladder ends here after 28 tokens at level 1"),
        (lambda: Nothing(), "the constraint allows no token after 23 tokens at level 1"),
    ],
    ids=["error", "nothing"],
)
def test_a_constraint_that_cannot_go_on_fails_its_request_alone(constraint: Any, message: str) -> None:
    engine = tiny_engine(level=1)
    engine.add_request(PROMPT, replace(SAMPLED, constraint=constraint), request_id="r")
    engine.add_request(PROMPT[:7], SAMPLED, request_id="other")
    engine.run()
    assert engine.final["r"].finish_reason == "error"
    assert message in (engine.final["r"].error or "")
    assert_as_reference(engine, "other", PROMPT[:7], SAMPLED)
    assert engine.arena.free_units == engine.arena.n_units


class Nothing:
    """Allows no token."""

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        return np.zeros(61, np.bool_)


@pytest.mark.parametrize("contradiction", [{"ignore_eos": True}, {"min_tokens": 1}], ids=str)
def test_what_contradicts_a_constraint_is_refused(contradiction: dict[str, Any]) -> None:
    (name,) = contradiction
    with pytest.raises(RequestError, match=f"{name} contradicts") as error:
        replace(SAMPLED, **contradiction)
    assert error.value.param == name
