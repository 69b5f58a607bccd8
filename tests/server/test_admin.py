"""`/admin`: events, draining and cancelling."""

from __future__ import annotations

import time
from typing import Any

import anyio
import httpx
import pytest

from tests.server.asgi import BODY, ENDLESS, app_of, error, until
from tests.server.tiny import tiny_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_events_tell_what_happened_and_when() -> None:
    async with app_of() as (_, http):
        await http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
        found = (await http.get("/admin/events")).json()
    assert [event["kind"] for event in found["events"]] == ["accept", "start", "finish"]
    assert all(event["request_id"].startswith("mine~") for event in found["events"])
    times = [event["time"] for event in found["events"]]
    assert times == sorted(times) and times[-1] <= found["now"]


async def test_draining_ends_what_is_open_and_refuses_what_comes() -> None:
    async with app_of() as (engine, http), anyio.create_task_group() as group:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await http.post("/v1/completions", json=ENDLESS | {"max_tokens": 300}))

        group.start_soon(ask)
        await until(lambda: engine.stats()["running"])
        assert (await http.post("/admin/drain")).json()["stats"]["state"] == "draining"
        for stream in (False, True):
            response = await http.post("/v1/completions", json=BODY | {"stream": stream})
            assert error(response) == (503, "draining")
            assert int(response.headers["retry-after"]) > 0
        await until(lambda: answers)
        assert answers[0].json()["usage"]["completion_tokens"] == 300
        back = await http.post("/admin/drain", json={"draining": False})
        assert back.json()["stats"]["state"] == "ready"
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


@pytest.mark.parametrize(
    ("body", "code"), [({"draining": 1}, "invalid_type"), ({"drain": True}, "unknown_parameter"), ([], None)], ids=str
)
async def test_bad_bodies_do_not_drain(body: Any, code: str | None) -> None:
    async with app_of() as (engine, http):
        response = await http.post("/admin/drain", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, code)
        assert engine.state != "draining"


@pytest.mark.parametrize("by", ["request", "answer"])
async def test_a_request_is_cancelled_by_its_id_or_by_one_of_its_answers(by: str) -> None:
    async with app_of() as (engine, http), anyio.create_task_group() as group:
        answers: list[httpx.Response] = []

        async def ask(name: str, n: int) -> None:
            answers.append(await http.post("/v1/completions", json=ENDLESS | {"n": n}, headers={"x-request-id": name}))

        group.start_soon(ask, "mine", 2)
        group.start_soon(ask, "mine.too", 1)
        await until(lambda: engine.stats()["running"] == 3)
        names = [request["id"] for request in engine.stats()["requests"]]
        mine = [name for name in names if name.startswith("mine~")]
        name, expected = ("mine", mine) if by == "request" else (mine[1], mine[1:])
        response = await http.post(f"/admin/cancel/{name}")
        assert response.json() == {"cancelled": expected}
        await until(lambda: answers)
        assert error(answers[0]) == (503, "cancelled")
        others = [each for each in names if each.startswith("mine.too~")]
        await until(lambda: [request["id"] for request in engine.stats()["requests"]] == others)
        await http.post("/admin/cancel/mine.too")


async def test_all_answers_of_a_request_are_cancelled_in_one_step_or_two() -> None:
    engine, steps = tiny_engine(), 0
    step = engine.step

    def slow() -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.05)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    async with app_of(engine) as (running, http), anyio.create_task_group() as group:
        body = ENDLESS | {"n": 16}
        group.start_soon(lambda: http.post("/v1/completions", json=body, headers={"x-request-id": "mine"}))
        await until(lambda: running.stats()["running"] == 16)
        before = steps
        response = await http.post("/admin/cancel/mine")
        assert len(response.json()["cancelled"]) == 16
        assert steps - before <= 6


@pytest.mark.parametrize("name", ["nobody", "mine~9", "%F0%9F%A6%86"])
async def test_who_is_not_open_cannot_be_cancelled(name: str) -> None:
    async with app_of() as (_, http):
        await http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
        assert error(await http.post(f"/admin/cancel/{name}")) == (404, "request_not_found")
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_stopped_engine_cancels_nothing() -> None:
    async with app_of() as (engine, http):
        await anyio.to_thread.run_sync(engine.close)
        assert error(await http.post("/admin/cancel/x")) == (404, "request_not_found")
        assert error(await http.post("/admin/level", json={"level": 1})) == (503, "engine_stopped")
