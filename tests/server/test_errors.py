"""Bad input: status, body in OpenAI's format, and the server goes on (the fixture checks)."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL, Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CHAT_BODY = {"model": MODEL, "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2}
TEXT_BODY = {"model": MODEL, "prompt": "fox", "max_tokens": 2}
SECRET = "correct horse"


def post(served: Served, path: str, body: dict[str, Any]) -> Any:
    """Posts JSON that is pure ASCII: `\\ud800` in it is legal JSON, though no text."""
    return served.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def check(response: Any, status: int, param: str | None, code: str | None) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["param"], error["code"]) == (param, code)
    assert SECRET not in response.text
    message: str = error["message"]
    return message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"dsla": {"levle": 1}}, "dsla.levle", "unknown_parameter"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"max_tokens": "2"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 2.0}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**30}, None, None),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 1.5}, "top_k", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stop": [SECRET, 5]}, "stop", "invalid_type"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"ignore_eos": 1}, "ignore_eos", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_type"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
        ({"presence_penalty": "x"}, "presence_penalty", "invalid_type"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_penalty": 101}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": True}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"best_of": 2}, "best_of", None),
        ({"dsla": {"max_level": 4}}, "dsla.max_level", "invalid_value"),
        ({"dsla": {"max_level": -1}}, "dsla.max_level", "invalid_value"),
        ({"dsla": {"min_level": 4}}, "dsla.min_level", "invalid_value"),
        ({"dsla": {"min_level": 2, "max_level": 1}}, "dsla.min_level", "invalid_value"),
        ({"dsla": {"quality": "best"}}, "dsla.quality", "invalid_value"),
        ({"dsla": {"quality": "full", "max_level": 1}}, "dsla.max_level", "invalid_value"),
        ({"dsla": 3}, "dsla", "invalid_type"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"model": 7}, "model", "invalid_type"),
        ({"model": None}, "model", "invalid_type"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_fields_of_both(
    served: Served, fields: dict[str, Any], param: str | None, code: str | None, stream: bool
) -> None:
    for path, body in ((CHAT, CHAT_BODY), (TEXT, TEXT_BODY)):
        expected = (param, code)
        if fields == {"best_of": 2}:
            expected = (param, "unknown_parameter" if path == CHAT else "unsupported_parameter")
        if fields == {"max_tokens": 10**30}:
            expected = ("messages" if path == CHAT else "prompt", "context_length_exceeded")
        response = served.http.post(path, json={**body, "stream": stream, **fields})
        message = check(response, 404 if code == "model_not_found" else 400, *expected)
        assert param is None or param in message or code == "model_not_found" or param.startswith("dsla.")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": SECRET}, "messages", "invalid_type"),
        ({"messages": [SECRET]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": SECRET}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": SECRET}]}, "messages[0].name", "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": SECRET}]},
            "messages",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": f"{SECRET} " * 900}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "messages", "context_length_exceeded"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_completion_tokens": 2, "max_tokens": 2}, None, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"dsla": {"stream_levels": True}}, None, "invalid_value"),
        ({"echo": True}, "echo", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:80] if isinstance(value, dict) else "",
)
def test_bad_chat_fields(served: Served, fields: dict[str, Any], param: str | None, code: str) -> None:
    check(post(served, CHAT, CHAT_BODY | fields), 400, param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_type"),
        ({"prompt": [[]]}, "prompt", "invalid_type"),
        ({"prompt": [1, SECRET]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": {"text": SECRET}}, "prompt", "invalid_type"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": ["fox", ""]}, "prompt", "invalid_value"),
        ({"prompt": [10**6]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": "\udfff"}, "prompt", "invalid_value"),
        ({"prompt": [1] * 4095}, "prompt", "context_length_exceeded"),
        ({"prompt": ["fox"] * 257}, "prompt", "invalid_value"),
        ({"max_tokens": 5000}, "prompt", "context_length_exceeded"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"suffix": SECRET}, "suffix", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"logprobs": -1}, "logprobs", "invalid_value"),
        ({"prompt": ["fox"] * 17, "n": 16}, "n", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"\ud800": 1}, None, None),
    ],
    ids=lambda value: ascii(value)[:80] if isinstance(value, dict) else "",
)
def test_bad_completion_fields(served: Served, fields: dict[str, Any], param: str | None, code: str | None) -> None:
    check(post(served, TEXT, TEXT_BODY | fields), 400, param, code)


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_fields(served: Served, name: str) -> None:
    body = {key: value for key, value in CHAT_BODY.items() if key != name}
    check(served.http.post(CHAT, json=body), 400, name, "missing_required_parameter")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model": "x",}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'"text"',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "comma", "no-utf8", "deep", "null", "list", "text", "long-number"],
)
def test_bodies_that_are_no_json_object(served: Served, content: bytes) -> None:
    response = served.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    check(response, 400, None, None)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(served: Served, value: str) -> None:
    content = f'{{"model": "{MODEL}", "prompt": "fox", "temperature": {value}}}'
    response = served.http.post(TEXT, content=content, headers={"content-type": "application/json"})
    check(response, 400, "temperature", "invalid_value")


@pytest.mark.parametrize("headers", [{}, {"content-type": ""}, {"content-type": "text/plain"}], ids=str)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, TEXT_BODY),
        (CHAT, CHAT_BODY),
        ("/tokenize", {"prompt": "fox"}),
        ("/detokenize", {"tokens": [1]}),
        ("/admin/level", {"level": 1}),
        ("/admin/drain", {"draining": True}),
    ],
)
def test_bodies_that_do_not_say_they_are_json_are_refused(
    served: Served, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    response = served.http.post(path, content=json.dumps(body).encode(), headers=headers)
    assert response.request.headers.get("content-type", "") == headers.get("content-type", "")
    assert "'Content-Type: application/json'" in check(response, 400, None, None)
    stats = served.stats()
    assert (stats["state"], stats["level"]) == ("ready", None)


def test_unknown_urls_and_methods(served: Served) -> None:
    check(served.http.get("/v1/nothing"), 404, None, "unknown_url")
    check(served.http.get(CHAT), 405, None, "method_not_allowed")
    check(served.http.get("/v1/models/gpt-5"), 404, "model", "model_not_found")


def test_the_official_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.client.completions.create(model="gpt-5", prompt="fox")
    with pytest.raises(openai.BadRequestError, match="Unsupported parameter: 'best_of'"):
        served.client.completions.create(model=MODEL, prompt="fox", best_of=3)


def test_a_mistake_in_one_prompt_of_several_leaves_nothing_running(served: Served) -> None:
    before = served.stats()["finished"]
    check(served.http.post(TEXT, json=TEXT_BODY | {"prompt": [[5], [10**6]]}), 400, "prompt", "invalid_value")
    assert served.stats()["finished"] == before


def test_full_queue_is_answered_429_and_when_to_come_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.engine.engine
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_max_running", 0)
        patch.setattr(engine, "config", replace(engine.config, max_waiting=1))
        first = pool.submit(post, served, TEXT, TEXT_BODY)
        while engine.stats()["waiting"] == 0:
            time.sleep(0.01)
        for stream in (False, True):
            refused = post(served, TEXT, {**TEXT_BODY, "stream": stream})
            assert "wait" in check(refused, 429, None, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        patch.undo()
        assert first.result(20).status_code == 200
