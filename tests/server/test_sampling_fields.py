"""Fields of sampling over HTTP: penalties, bias, several answers, probabilities; in one piece and streamed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dsla.engine import SamplingParams
from tests.server.conftest import MODEL, Served
from tests.server.test_openai import MESSAGES, directly, events
from tests.server.tiny import tiny_tokenizer

CLOSE = 1e-4
"""How far an fp32 model's probabilities may differ with what else is in its batches."""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick", "max_tokens": 30, "ignore_eos": True, "seed": 5}
CHAT_BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 30, "ignore_eos": True, "seed": 5}


def answer(served: Served, path: str, body: dict[str, Any]) -> Any:
    response = served.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -1}, {"frequency_penalty": -1.0}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"logit_bias": {"70": 8, "71": -100}}, {"logit_bias": {70: 8.0, 71: -100.0}}),
        ({"min_tokens": 25, "ignore_eos": False}, {"min_tokens": 25, "ignore_eos": False}),
        ({"temperature": 0, "frequency_penalty": 2}, {"temperature": 0.0, "frequency_penalty": 2.0}),
        ({"presence_penalty": None, "logit_bias": None, "min_tokens": None, "repetition_penalty": None, "n": None}, {}),
    ],
    ids=str,
)
def test_fields_reach_the_engine(served: Served, fields: dict[str, Any], params: dict[str, Any]) -> None:
    settings = {"max_tokens": 30, "temperature": 1.0, "seed": 5, "ignore_eos": True} | params
    expected = directly(tiny_tokenizer()("the quick")["input_ids"], SamplingParams(**settings))
    assert answer(served, TEXT, BODY | fields)["choices"][0]["text"] == expected
    assert "".join(chunk["choices"][0]["text"] for chunk in events(served, TEXT, BODY | fields)) == expected


def test_several_answers_are_those_of_derived_seeds(served: Served) -> None:
    prompts = ["the quick", "lazy dog"]
    single = [answer(served, TEXT, BODY | {"prompt": prompt})["choices"][0]["text"] for prompt in prompts]
    body = BODY | {"prompt": prompts, "n": 3}
    whole = answer(served, TEXT, body)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    texts = [choice["text"] for choice in whole["choices"]]
    assert [texts[0], texts[3]] == single
    assert len(set(texts)) == 6
    assert texts == [choice["text"] for choice in answer(served, TEXT, body)["choices"]]
    assert "dsla" not in whole and all("dsla" in choice for choice in whole["choices"])
    count = sum(len(tiny_tokenizer()(prompt)["input_ids"]) for prompt in prompts)
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (count, 180, count + 180)
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < count
    streamed = [""] * 6
    chunks = events(served, TEXT, body | {"stream_options": {"include_usage": True}})
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    assert chunks[-1]["usage"]["completion_tokens"] == 180
    assert chunks[-1]["usage"]["prompt_tokens"] == count


def test_several_chat_answers_with_the_official_client(served: Served) -> None:
    common: dict[str, Any] = {
        "model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": 8, "n": 4, "extra_body": {"ignore_eos": True}
    }  # fmt: skip
    whole = served.client.chat.completions.create(**common)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert whole.usage is not None and whole.usage.completion_tokens == 80
    assert whole.usage.prompt_tokens_details is not None
    single = served.client.chat.completions.create(**common | {"n": 1})
    assert single.choices[0].message.content == texts[0]
    assert single.usage is not None and single.usage.prompt_tokens == whole.usage.prompt_tokens
    streamed, reasons, roles = [""] * 4, {}, []
    for chunk in served.client.chat.completions.create(**common, stream=True):
        (choice,) = chunk.choices
        roles += [choice.index] if choice.delta.role else []
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert streamed == texts
    assert roles == [0, 1, 2, 3]
    assert reasons == dict.fromkeys(range(4), "length")


def test_without_a_seed_several_answers_differ(served: Served) -> None:
    body = {key: value for key, value in BODY.items() if key != "seed"} | {"n": 5}
    assert len({choice["text"] for choice in answer(served, TEXT, body)["choices"]}) == 5


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_chat_probabilities_with_the_official_client(served: Served, temperature: float) -> None:
    common: dict[str, Any] = {
        "model": MODEL, "messages": MESSAGES, "max_tokens": 25, "seed": 3, "temperature": temperature,
        "logprobs": True, "top_logprobs": 4, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    (choice,) = served.client.chat.completions.create(**common).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert len(content) == 25
    special = {token: text.encode() for text, token in tiny_tokenizer().get_added_vocab().items()}
    spoken = b"".join(bytes(entry.bytes or ()) for entry in content if bytes(entry.bytes or ()) not in special.values())
    assert spoken.decode(errors="replace") == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob <= 0
        top = [other.logprob for other in entry.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-9
        assert temperature or (entry.token, entry.logprob) == (entry.top_logprobs[0].token, top[0])
    streamed = []
    for chunk in served.client.chat.completions.create(**common, stream=True):
        part = chunk.choices[0].logprobs
        streamed += [] if part is None else part.content or []
    assert [(entry.token, entry.bytes) for entry in streamed] == [(entry.token, entry.bytes) for entry in content]
    for one, other in zip(streamed, content, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=CLOSE)
        assert [top.token for top in one.top_logprobs] == [top.token for top in other.top_logprobs]


@pytest.mark.parametrize("count", [0, 3])
def test_completion_probabilities(served: Served, count: int) -> None:
    body = BODY | {"logprobs": count, "n": 2, "temperature": 1.3}
    for choice in answer(served, TEXT, body)["choices"]:
        found = choice["logprobs"]
        assert {len(part) for part in found.values()} == {30}
        for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
            assert top[token] == logprob
            assert (count or 1) <= len(top) <= count + 1
        assert found["text_offset"] == sorted(found["text_offset"])
        for i, token in enumerate(found["tokens"]):
            if not token.startswith(("bytes:", "<|")):
                assert choice["text"].startswith(token, found["text_offset"][i])
        streamed: dict[str, list[Any]] = {name: [] for name in found}
        for chunk in events(served, TEXT, body):
            if chunk["choices"][0]["index"] == choice["index"]:
                for name, part in chunk["choices"][0]["logprobs"].items():
                    streamed[name] += part
        assert (streamed["tokens"], streamed["text_offset"]) == (found["tokens"], found["text_offset"])
        assert streamed["token_logprobs"] == pytest.approx(found["token_logprobs"], abs=CLOSE)
        for one, other in zip(streamed["top_logprobs"], found["top_logprobs"], strict=True):
            assert one == pytest.approx(other, abs=CLOSE)


def test_probabilities_are_of_the_model_whatever_is_asked_of_sampling(served: Served) -> None:
    body = BODY | {"max_tokens": 1, "logprobs": 5, "temperature": 0}
    plain = answer(served, TEXT, body)["choices"][0]["logprobs"]
    edited = answer(served, TEXT, body | {"logit_bias": {"70": 100}, "temperature": 2})["choices"][0]["logprobs"]
    assert edited["tokens"] != plain["tokens"]
    for token, logprob in plain["top_logprobs"][0].items():
        assert edited["top_logprobs"][0][token] == pytest.approx(logprob, abs=CLOSE)


def test_a_stop_text_cuts_probabilities_with_the_text(served: Served) -> None:
    whole = answer(served, TEXT, BODY | {"logprobs": 0})["choices"][0]
    stop = whole["text"][12:15]
    body = BODY | {"logprobs": 0, "stop": stop}
    cut = answer(served, TEXT, body)["choices"][0]
    assert cut["finish_reason"] == "stop"
    kept = sum(offset < len(cut["text"]) for offset in whole["logprobs"]["text_offset"])
    assert 0 < kept < 30
    for name in ("tokens", "text_offset"):
        assert cut["logprobs"][name] == whole["logprobs"][name][:kept]
    assert {len(part) for part in cut["logprobs"].values()} == {kept}
    streamed = [token for chunk in events(served, TEXT, body) for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert streamed == cut["logprobs"]["tokens"]


def test_without_a_wish_there_are_no_probabilities(served: Served) -> None:
    assert "logprobs" not in answer(served, TEXT, BODY)["choices"][0]
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in events(served, CHAT, CHAT_BODY))
    assert "logprobs" not in answer(served, CHAT, CHAT_BODY | {"logprobs": False, "top_logprobs": 0})["choices"][0]
    own = answer(served, CHAT, CHAT_BODY | {"logprobs": True})["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in own] == [[]] * 30


def test_a_prompt_is_computed_once_for_all_its_answers(served: Served) -> None:
    body = BODY | {"prompt": "fox jumps over " * 20, "n": 3}
    first = answer(served, TEXT, body)["usage"]
    count = first["prompt_tokens"]
    starts = [event for event in served.stats()["events"] if event["kind"] == "start"][-3:]
    assert [(event["reason"], event["from_token"]) for event in starts] == [
        ("admitted", 0), ("forked", count), ("forked", count)
    ]  # fmt: skip
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < answer(served, TEXT, body)["usage"]["prompt_tokens_details"]["cached_tokens"] < count
