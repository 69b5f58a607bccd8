"""The API as the official client and raw HTTP see it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsla.engine import SamplingParams
from tests.server.conftest import MODEL, Served
from tests.server.tiny import tiny_engine, tiny_tokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown 🦆"}]
COMMON: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}


def directly(prompt: list[int], params: SamplingParams) -> str:
    """The text an engine without a server generates."""
    engine = tiny_engine()
    engine.add_request(prompt, params)
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.tokens
    text: str = tiny_tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def events(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """Data of a stream's events, the last one `[DONE]`."""
    with served.http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def test_models(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert (model.id, model.owned_by, model.model_extra) == (MODEL, "dsla", {"max_model_len": 4096, "max_level": 3})
    assert served.client.models.retrieve(MODEL) == model


def test_chat_completion(served: Served) -> None:
    answer = served.client.chat.completions.create(messages=MESSAGES, max_tokens=40, **COMMON)
    prompt = tiny_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == directly(prompt, SamplingParams(40, ignore_eos=True))
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 40)
    assert answer.usage.total_tokens == len(prompt) + 40
    assert answer.model_extra == {"dsla": {"levels": [[0, 0]], "folded_tokens": 0}}


def test_a_streamed_chat_is_the_same_chat(served: Served) -> None:
    whole = served.client.chat.completions.create(messages=MESSAGES, max_completion_tokens=60, **COMMON)
    stream = served.client.chat.completions.create(
        messages=MESSAGES, max_completion_tokens=60, stream=True, stream_options={"include_usage": True}, **COMMON
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    *before, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in before)
    assert last.model_extra == whole.model_extra == before[-1].model_extra


def test_the_last_event_is_done_and_usage_comes_on_demand(served: Served) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3}
    chunks = events(served, "/v1/chat/completions", body)
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["dsla"] == {"levels": [[0, 0]], "folded_tokens": 0}
    chunks = events(served, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "top_p": 0.9, "top_k": 20, "temperature": 1.5}]
)
def test_repeated_and_streamed_completions_are_equal(served: Served, sampling: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "the quick", "max_tokens": 50, "ignore_eos": True} | sampling
    first, second = (served.http.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    chunks = events(served, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == first["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_sampling_without_a_seed_differs(served: Served) -> None:
    texts = {
        served.client.completions.create(model=MODEL, prompt="fox", max_tokens=20, extra_body={"ignore_eos": True})
        .choices[0]
        .text
        for _ in range(3)
    }
    assert len(texts) == 3


def test_end_token_ends_unless_ignored(served: Served) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "fox", "max_tokens": 1000, "seed": 3, "temperature": 2}
    answers = [
        served.http.post("/v1/completions", json=body | {"ignore_eos": ignore}).json() for ignore in (False, True)
    ]
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["stop", "length"]
    assert answers[0]["usage"]["completion_tokens"] < 1000 == answers[1]["usage"]["completion_tokens"]
    text = answers[0]["choices"][0]["text"]
    assert answers[1]["choices"][0]["text"].startswith(text)


def test_several_prompts(served: Served) -> None:
    prompts = ["the quick", "lazy dog, again", "🦆"]
    texts = [
        served.client.completions.create(prompt=prompt, max_tokens=12, **COMMON).choices[0].text for prompt in prompts
    ]
    answer = served.client.completions.create(prompt=prompts, max_tokens=12, **COMMON)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    assert all(choice.model_extra == {"dsla": {"levels": [[0, 0]], "folded_tokens": 0}} for choice in answer.choices)
    streamed = ["", "", ""]
    for chunk in served.client.completions.create(prompt=prompts, max_tokens=12, stream=True, **COMMON):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_token_id_prompts_equal_text(served: Served) -> None:
    text = "the lazy dog 漢字"
    ids = tiny_tokenizer()(text)["input_ids"]
    expected = served.client.completions.create(prompt=text, max_tokens=8, **COMMON).choices[0].text
    assert served.client.completions.create(prompt=ids, max_tokens=8, **COMMON).choices[0].text == expected
    answer = served.client.completions.create(prompt=[ids, ids], max_tokens=8, **COMMON)
    assert [choice.text for choice in answer.choices] == [expected, expected]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_stop_text_is_found_across_tokens_and_never_sent(served: Served, length: int) -> None:
    body = {"model": MODEL, "prompt": "the quick", "max_tokens": 80, "temperature": 0, "ignore_eos": True}
    whole = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = whole[30 : 30 + length]
    expected = whole[: whole.index(stop)]
    for value in (stop, ["never there", stop]):
        answer = served.http.post("/v1/completions", json=body | {"stop": value}).json()
        assert answer["choices"][0]["text"] == expected
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] < 80
        chunks = events(served, "/v1/completions", body | {"stop": value})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_neutral_values_of_other_fields_are_taken(served: Served) -> None:
    served.client.chat.completions.create(
        messages=[{"role": "assistant", "content": "hi", "refusal": None}, *MESSAGES],
        max_tokens=2, n=1, presence_penalty=0, frequency_penalty=0.0, logprobs=False, logit_bias={}, user="me",
        tools=[], response_format={"type": "text"}, stop=None, **COMMON,
    )  # fmt: skip


def test_text_parts_and_roles(served: Served) -> None:
    def answer(messages: list[Any]) -> str | None:
        return (
            served.client.chat.completions.create(messages=messages, max_tokens=9, **COMMON).choices[0].message.content
        )

    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": " brown 🦆"}]
    assert answer([{"role": "user", "content": parts}]) == answer(MESSAGES)
    system = [{"role": role, "content": "be brief"} for role in ("system", "developer")]
    assert answer([system[0], *MESSAGES]) == answer([system[1], *MESSAGES])


def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(served: Served) -> None:
    message = [{"role": "user", "content": "x" * 4000}]
    answer = served.client.chat.completions.create(messages=message, **COMMON)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4096
