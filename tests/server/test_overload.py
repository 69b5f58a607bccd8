"""More requests than the queue holds: each is refused before its answer begins, and places come back from those that leave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dsla.engine import AsyncEngine, EngineConfig
from dsla.server.app import build_app
from tests.server.asgi import BODY, app_of, error, until
from tests.server.conftest import MODEL
from tests.server.tiny import tiny_engine, tiny_tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def small_queue(places: int) -> Any:
    return tiny_engine(config=EngineConfig(max_step_tokens=256, max_waiting=places))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_burst_beyond_the_queue_is_answered_429_and_the_rest_in_full(
    stream: bool, gate: threading.Event
) -> None:
    async with app_of(small_queue(3)) as (engine, http):
        engine._send(lambda: gate.wait(30))  # nothing is added to the queue meanwhile
        asked = [asyncio.create_task(http.post("/v1/completions", json=BODY | {"stream": stream})) for _ in range(12)]
        await until(lambda: sum(task.done() for task in asked) == 9)
        gate.set()
        answers = await asyncio.gather(*asked)
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 9
        for answer in answers:
            if answer.status_code == 429:
                assert error(answer) == (429, "overloaded")
                assert int(answer.headers["retry-after"]) >= 1
            else:
                assert '"error"' not in answer.text and answer.text.endswith("[DONE]\n\n") == stream
        assert (await http.post("/v1/completions", json=BODY | {"n": 3})).status_code == 200


async def test_answers_of_which_one_finds_no_place_leave_none_taken(gate: threading.Event) -> None:
    async with app_of(small_queue(3)) as (engine, http):
        engine._send(lambda: gate.wait(30))
        first = asyncio.create_task(http.post("/v1/completions", json=BODY | {"n": 2}))
        await until(lambda: len(engine._reserved) == 2)
        for body in (BODY | {"n": 2}, BODY | {"prompt": ["fox", "dog"]}):
            assert error(await http.post("/v1/completions", json=body)) == (429, "overloaded")
            assert len(engine._reserved) == 2
        refused = await http.post("/v1/completions", json=BODY | {"prompt": [[5], [10**6]]})
        assert refused.status_code == 400
        assert len(engine._reserved) == 2
        gate.set()
        assert (await first).status_code == 200


async def test_more_answers_than_the_queue_can_ever_hold_are_a_400() -> None:
    async with app_of(small_queue(3)) as (_, http):
        for fields in ({"n": 4}, {"prompt": ["a", "b"], "n": 2}, {"n": 4, "stream": True}):
            response = await http.post("/v1/completions", json=BODY | fields)
            assert error(response) == (400, "invalid_value")
            assert "queue, which holds 3" in response.text
            assert "retry-after" not in response.headers


async def leave(app: Any, engine: AsyncEngine, body: dict[str, Any]) -> list[Any]:
    """Sends a request, and leaves as soon as it has a place in the queue; what was answered."""
    sent, content = [], [json.dumps(body).encode()]

    async def receive() -> dict[str, Any]:
        if content:
            return {"type": "http.request", "body": content.pop()}
        while not engine._reserved:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_places_of_those_that_leave_before_they_are_added_come_back(stream: bool, gate: threading.Event) -> None:
    engine = AsyncEngine(small_queue(2))
    app = build_app(engine, tiny_tokenizer(), MODEL)
    try:
        engine._send(lambda: gate.wait(30))
        for _ in range(4):
            sent = await leave(app, engine, BODY | {"n": 2, "stream": stream})
            assert [message["status"] for message in sent if "status" in message] in ([], [200], [499])
            assert not engine._reserved
        gate.set()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            assert (await http.post("/v1/completions", json=BODY | {"n": 2})).status_code == 200
        finished = engine.stats()["finished"]
        assert sum(finished.values()) == 2, "those that left were never computed"
    finally:
        await asyncio.to_thread(engine.close)
