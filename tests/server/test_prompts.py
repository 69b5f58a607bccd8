"""Prompts that are not read, and those that are, in threads of their own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from dsla.server.prompts import PromptReader
from tests.server.asgi import BODY, app_of, error, until
from tests.server.conftest import MODEL, Served
from tests.server.tiny import tiny_tokenizer

LONG = "fox " * 20_000
"""More than 4,096 tokens, however long they are."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": LONG}, "prompt"),
        ("/v1/completions", {"model": MODEL, "prompt": ["fox", LONG], "stream": True}, "prompt"),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ],
    ids=["completion", "stream", "chat", "tokenize", "tokenize a chat"],
)
def test_a_prompt_that_cannot_fit_is_not_tokenized(
    served: Served, path: str, body: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = list[int]()
    call = type(tiny_tokenizer()).__call__

    def counting(self: Any, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tiny_tokenizer()), "__call__", counting)
    response = served.http.post(path, json=body)
    assert error(response) == (400, "context_length_exceeded")
    found = response.json()["error"]
    assert found["param"] == param and "4096 tokens" in found["message"] and param in found["message"]
    assert max(lengths, default=0) < 100


def test_a_long_text_that_may_fit_is_counted(served: Served) -> None:
    answer = served.http.post("/tokenize", json={"prompt": "fox " * 10_000})
    assert answer.json()["count"] > 4096


@pytest.mark.anyio
async def test_an_engine_is_closed_while_prompts_are_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    go, encode, begun = threading.Event(), PromptReader._encode, list[str]()

    def slow(self: PromptReader, text: str, *rest: Any) -> list[int]:
        begun.append(text)
        assert go.wait(20)
        return encode(self, text, *rest)

    monkeypatch.setattr(PromptReader, "_encode", slow)
    async with app_of(request_seconds=5.0) as (engine, http):
        posts = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(80)]
        await until(lambda: begun)
        await asyncio.wait_for(asyncio.to_thread(engine.close), 3)
        assert not any(post.done() for post in posts)
        go.set()
        assert {answer.status_code for answer in await asyncio.gather(*posts)} == {503}


@pytest.mark.anyio
async def test_a_prompt_waits_no_longer_than_its_request_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(PromptReader, "_encode", lambda *given: [5] if go.wait(20) else [])
    async with app_of(request_seconds=0.3) as (_, http):
        for answer in await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(4))):
            assert error(answer) == (504, "timeout")
        go.set()
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
