"""Sampling as the engine does it: what requests may ask for, end tokens, probabilities in the outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsla.engine import SamplingParams, StepOutput
from dsla.errors import RequestError
from tests.engine.tiny import RecordingEngine, random_prompt, tiny_engine

PROMPT = random_prompt(23, 2)
GREEDY = SamplingParams(max_tokens=12)


def run(params: SamplingParams, engine: RecordingEngine | None = None) -> tuple[list[int], list[StepOutput]]:
    """Tokens and outputs of one request."""
    engine = engine or tiny_engine()
    engine.add_request(PROMPT, params, request_id="r")
    outputs = []
    while engine.has_work:
        outputs += [output for output in engine.step() if output.request_id == "r"]
    return [token for output in outputs for token in output.tokens], outputs


def test_end_tokens_wait_for_min_tokens() -> None:
    free, _ = run(replace(GREEDY, ignore_eos=True))
    ends = replace(GREEDY, stop_token_ids=(free[3],))
    tokens, outputs = run(ends)
    assert len(tokens) <= 3 and outputs[-1].finish_reason == "stop"
    tokens, outputs = run(replace(ends, min_tokens=8))
    assert len(tokens) >= 8 and free[3] not in tokens[:8]
    tokens, outputs = run(replace(ends, min_tokens=12))
    assert len(tokens) == 12 and outputs[-1].finish_reason == "length"


def test_the_model_s_own_end_token_waits_too_unless_it_is_ignored() -> None:
    (end,) = tiny_engine().decoder.eos_token_ids
    pushed = replace(GREEDY, logit_bias={end: 100.0})
    assert run(pushed)[0] == []
    tokens, outputs = run(replace(pushed, min_tokens=5))
    assert len(tokens) == 5 and end not in tokens and outputs[-1].finish_reason == "stop"
    assert run(replace(pushed, min_tokens=5, ignore_eos=True))[0] == [end] * 12


def test_outputs_hold_the_probabilities_of_their_tokens() -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3, ignore_eos=True, logprobs=4, frequency_penalty=1.0)
    tokens, outputs = run(params, engine)
    reported = [report for output in outputs for report in output.logprobs or ()]
    assert [len(output.logprobs or ()) for output in outputs] == [len(output.tokens) for output in outputs]
    for token, report, logits in zip(tokens, reported, engine.logits["r"], strict=True):
        expected = logits.log_softmax(-1)
        assert report[0] == (token, pytest.approx(float(expected[token]), abs=1e-12))
        assert [entry[0] for entry in report[1:]] == expected.topk(4).indices.tolist()
        assert torch.tensor([entry[1] for entry in report[1:]]).diff().max() <= 0


def test_the_token_that_ends_a_request_has_no_report() -> None:
    (end,) = tiny_engine().decoder.eos_token_ids
    _, outputs = run(replace(GREEDY, logprobs=2, logit_bias={end: 100.0}))
    assert [(output.tokens, output.logprobs) for output in outputs] == [([], ())]
    _, outputs = run(GREEDY)
    assert {output.logprobs for output in outputs} == {None}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, frequency_penalty=0.5, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=20, repetition_penalty=1.4, presence_penalty=0.3, min_tokens=7, logprobs=3),
    ],
    ids=["drawn", "greedy"],
)
def test_others_in_the_batch_do_not_change_the_output(params: SamplingParams) -> None:
    alone, _ = run(params)
    engine = tiny_engine(max_step_tokens=64)
    for seed in range(5):
        engine.add_request(random_prompt(7, seed), replace(params, seed=seed, top_k=5), request_id=str(seed))
    assert run(params, engine)[0] == alone


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        (replace(GREEDY, logit_bias={61: 1.0}), "logit_bias", "logit_bias holds token id 61, the model knows 0 to 60"),
        (replace(GREEDY, logit_bias={-1: 1.0}), "logit_bias", "token id -1"),
        (replace(GREEDY, stop_token_ids=(4, 99)), "stop_token_ids", "token id 99"),
        (replace(GREEDY, stop_token_ids=tuple(range(61)), min_tokens=1), "min_tokens", "every token"),
    ],
    ids=["above", "below", "stop", "all"],
)
def test_unknown_tokens_are_refused(params: SamplingParams, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        tiny_engine().add_request(PROMPT, params)
    assert error.value.param == param
