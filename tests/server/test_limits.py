"""Limits: each answers with its status, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import httpx
import pytest

from dsla.server import limits
from tests.server.asgi import BODY, ENDLESS, app_of, error, until
from tests.server.conftest import MODEL
from tests.server.site import Site

JSON = {"content-type": "application/json"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """A server that takes bodies of 2,000 bytes and a second; its address."""
    with Site(MODEL, max_body_bytes=2000, request_seconds=1.0) as site:
        yield site.address


def test_a_body_that_says_it_is_too_long_is_not_read(small: str) -> None:
    with httpx.Client(base_url=small) as http:
        response = http.post("/v1/completions", content=b" " * 2001, headers=JSON)
        assert error(response) == (413, "body_too_large")
        assert "at most 2000 bytes" in response.text
        fitting = json.dumps(BODY).encode().ljust(2000)
        assert http.post("/v1/completions", content=fitting, headers=JSON).status_code == 200


def test_a_body_that_turns_out_too_long_is_cut_off(small: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    with httpx.Client(base_url=small) as http:
        assert error(http.post("/v1/completions", content=parts(), headers=JSON)) == (413, "body_too_large")
        assert http.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_a_408(small: str) -> None:
    host, port = small.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        answer = ""
        while not answer.endswith("}"):
            answer += slow.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 408")
    assert '"code":"request_timeout"' in answer
    assert httpx.get(f"{small}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_that_takes_too_long_ends_with_an_error(small: str, stream: bool) -> None:
    body = ENDLESS | {"stream": stream, "n": 8}
    response = httpx.post(f"{small}/v1/completions", json=body, timeout=20)
    if stream:
        assert response.status_code == 200
        lines = response.text.strip().split("\n\n")
        assert len(lines) > 2 and "[DONE]" not in response.text
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    else:
        assert error(response) == (504, "timeout")
    end = time.monotonic() + 5
    while httpx.get(f"{small}/admin/state").json()["stats"]["requests"]:
        assert time.monotonic() < end, "it goes on behind the client's back"
    assert httpx.post(f"{small}/v1/completions", json=BODY).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"prompt": ["a", "b", "c"]}),
        ("completions", {"prompt": ["a", "b"], "n": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 3}),
    ],
)
async def test_answers_of_a_request_are_limited(path: str, fields: dict[str, Any]) -> None:
    async with app_of(max_answers=2) as (_, http):
        body = {"model": MODEL, "max_tokens": 1} | fields
        response = await http.post(f"/v1/{path}", json=body)
        assert error(response) == (400, "invalid_value")
        assert "at most 2 answers" in response.text
        assert (await http.post("/v1/completions", json=BODY | {"n": 2})).status_code == 200


@pytest.mark.anyio
async def test_requests_open_at_once_are_limited_by_key() -> None:
    first, second = ({"authorization": f"Bearer {key}"} for key in ("first", "second"))
    async with (
        app_of(max_concurrent=1, api_keys=("first", "second")) as (engine, http),
        anyio.create_task_group() as group,
    ):
        ended = anyio.Event()

        async def ask() -> None:
            await http.post("/v1/completions", json=ENDLESS, headers=first)
            ended.set()

        group.start_soon(ask)
        await until(lambda: engine.stats()["running"])
        for path, body in (("/v1/completions", BODY), ("/tokenize", {"prompt": "x"})):
            response = await http.post(path, json=body, headers=first)
            assert error(response) == (429, "too_many_requests")
            assert int(response.headers["retry-after"]) > 0
            assert (await http.post(path, json=body, headers=second)).status_code == 200
        assert (await http.get("/v1/models", headers=first)).status_code == 200
        for request in engine.stats()["requests"]:
            await anyio.to_thread.run_sync(engine.cancel, request["id"])
        await ended.wait()
        assert (await http.post("/v1/completions", json=BODY, headers=first)).status_code == 200


@pytest.mark.anyio
async def test_failed_requests_do_not_count_as_open() -> None:
    async with app_of(max_concurrent=1) as (_, http):
        for _ in range(3):
            assert (await http.post("/v1/completions", content=b"{", headers=JSON)).status_code == 400
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


@pytest.mark.anyio
async def test_the_admin_api_answers_when_the_limit_is_reached() -> None:
    async with app_of(max_concurrent=1) as (engine, http), anyio.create_task_group() as group:
        group.start_soon(lambda: http.post("/v1/completions", json=ENDLESS))
        await until(lambda: engine.stats()["running"])
        assert (await http.post("/v1/completions", json=BODY)).status_code == 429
        assert (await http.post("/admin/drain")).status_code == 200
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_bodies_of_all_requests_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODIES", 2)
    size = len(json.dumps(ENDLESS).encode())
    async with app_of(max_body_bytes=size + 10) as (engine, http):
        open_ = [asyncio.create_task(http.post("/v1/completions", json=ENDLESS)) for _ in range(2)]
        await until(lambda: engine.stats()["running"] == 2)
        for content in (json.dumps(ENDLESS).encode(), b"{" * size):
            refused = await http.post("/v1/completions", content=content, headers=JSON)
            assert error(refused) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 200, "there is room for a little"
        drained = json.dumps({"draining": False}).encode().ljust(size)
        assert (await http.post("/admin/drain", content=drained, headers=JSON)).status_code == 200
        for request in engine.stats()["requests"]:
            await anyio.to_thread.run_sync(engine.cancel, request["id"])
        await asyncio.gather(*open_)
        for _ in range(5):
            assert (await http.post("/v1/completions", content=b"{" * size, headers=JSON)).status_code == 400
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


@pytest.mark.anyio
async def test_without_origins_no_other_page_may_read_anything() -> None:
    async with app_of() as (_, http):
        headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
        assert (await http.options("/v1/completions", headers=headers)).status_code == 405
        response = await http.post("/v1/completions", json=BODY, headers={"origin": "https://example.org"})
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.anyio
@pytest.mark.parametrize(("allowed", "origin"), [("https://example.org", "https://example.org"), ("*", "*")])
async def test_pages_of_an_allowed_origin_may_ask(allowed: str, origin: str) -> None:
    async with app_of(cors_origins=(allowed,), api_keys=("key",)) as (_, http):
        ask = {
            "origin": "https://example.org",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
        }
        preflight = await http.options("/v1/completions", headers=ask)
        assert preflight.status_code == 200, "a preflight request has no key"
        assert preflight.headers["access-control-allow-origin"] == origin
        refused = await http.post("/v1/completions", json=BODY, headers={"origin": "https://example.org"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin, "the page must be able to read the error"
        if allowed != "*":
            other = await http.options("/v1/completions", headers=ask | {"origin": "https://evil.example"})
            assert other.status_code == 400
            assert "access-control-allow-origin" not in other.headers


@pytest.mark.anyio
async def test_a_body_in_parts_is_put_together() -> None:
    async with app_of() as (_, http):

        async def body() -> AsyncIterator[bytes]:
            yield b'{"model": '
            yield json.dumps(MODEL).encode() + b', "prompt": "fox", "max_tokens": 1}'

        assert (await http.post("/v1/completions", content=body(), headers=JSON)).status_code == 200
