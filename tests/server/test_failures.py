"""The engine stops or breaks: the right status, or an error event in a stream, and no detail of the inside."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import anyio
import httpx
import pytest

from dsla.engine import AsyncEngine
from dsla.server.app import build_app
from tests.server.asgi import app_of
from tests.server.conftest import MODEL
from tests.server.tiny import tiny_decoder, tiny_engine, tiny_tokenizer

BODY: dict[str, Any] = {"model": MODEL, "prompt": "fox", "max_tokens": 1000, "ignore_eos": True}


def broken_decoder() -> Any:
    decoder = copy.copy(tiny_decoder())
    decoder.weights = copy.copy(decoder.weights)
    norm = decoder.weights.norm
    object.__setattr__(decoder.weights, "norm", dataclasses.replace(norm, weight=norm.weight * float("nan")))
    return decoder


def last_event(text: str) -> Any:
    return json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))


@pytest.mark.anyio
async def test_a_stopped_engine_answers_503_everywhere() -> None:
    async with app_of(tiny_engine()) as (engine, http):
        assert (await http.get("/health")).status_code == 200
        await anyio.to_thread.run_sync(engine.close)
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/completions", BODY | {"stream": True}),
            ("/admin/level", {"level": 1}),
        ):
            response = await http.post(path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_stopped")
        assert (await http.get("/health")).status_code == 503


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_in_flight_hear_of_a_stop(stream: bool) -> None:
    async with app_of(tiny_engine()) as (engine, http), anyio.create_task_group() as group:

        async def stop() -> None:
            while not engine.stats()["requests"]:
                await anyio.sleep(0.005)
            await anyio.to_thread.run_sync(engine.close)

        group.start_soon(stop)
        response = await http.post("/v1/completions", json=BODY | {"stream": stream, "max_tokens": 4000})
        error = last_event(response.text)["error"] if stream else response.json()["error"]
        assert error["type"] == "server_error"
        assert response.status_code == (200 if stream else 503)
        assert "[DONE]" not in response.text


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_request_is_a_500_without_details(stream: bool) -> None:
    async with app_of(tiny_engine(broken_decoder())) as (_, http):
        response = await http.post("/v1/completions", json=BODY | {"stream": stream})
        error = last_event(response.text)["error"] if stream else response.json()["error"]
        assert error["code"] == "internal_error"
        assert "finite" not in response.text
        assert (await http.get("/health")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
async def test_a_crashed_engine_is_reported_without_details(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()

    def crash() -> None:
        raise kind("secret inside")

    monkeypatch.setattr(engine, "step", crash)
    async with app_of(engine) as (_, http):
        response = await http.post("/v1/completions", json=BODY)
        assert response.status_code >= 500
        assert "secret" not in response.text
        health = await http.get("/health")
        assert health.status_code == 503
        assert "secret" not in health.text


@pytest.mark.anyio
async def test_a_request_that_can_never_fit_is_a_400() -> None:
    async with app_of(tiny_engine(budget_bytes=64 << 10)) as (_, http):
        response = await http.post("/v1/completions", json=BODY | {"max_tokens": 4000, "dsla": {"quality": "full"}})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "request_too_large")
        assert (await http.post("/v1/completions", json=BODY | {"max_tokens": 2})).status_code == 200


@pytest.mark.anyio
async def test_an_unforeseen_error_is_a_500_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async with app_of(tiny_engine()) as (engine, http):

        def generate(*args: Any, **kwargs: Any) -> None:
            raise ValueError("secret inside")

        monkeypatch.setattr(engine, "generate", generate)
        response = await http.post("/v1/completions", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in response.text


@pytest.mark.anyio
@pytest.mark.parametrize(("client", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 403), ("name", 403)])
async def test_admin_is_for_this_machine(client: str, status: int) -> None:
    async with app_of(tiny_engine(), client) as (_, http):
        assert (await http.get("/admin/state")).status_code == status
        assert (await http.post("/admin/level", json={"level": 1})).status_code == status


@pytest.mark.anyio
async def test_without_a_chat_template_chat_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    engine = AsyncEngine(tiny_engine())
    transport = httpx.ASGITransport(build_app(engine, tokenizer, MODEL))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "fox"}]}
        response = await http.post("/v1/chat/completions", json=body)
    await anyio.to_thread.run_sync(engine.close)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
