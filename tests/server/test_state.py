"""`/admin/state`: what a watcher who asks again and again gets."""

from __future__ import annotations

import anyio
import pytest

from dsla.engine import EngineConfig
from tests.server.asgi import BODY, ENDLESS, app_of, until
from tests.server.tiny import tiny_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("path", ["/admin/events", "/admin/state"])
async def test_events_that_are_known_can_be_left_out(path: str) -> None:
    async with app_of() as (_, http):
        await http.post("/v1/completions", json=BODY)
        found = (await http.get(path, params={"events_after": 2})).json()
        found = found.get("stats", found)
        refused = await http.get(path, params={"events_after": -1})
    assert ([event["kind"] for event in found["events"]], found["event_count"]) == (["finish"], 3)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "events_after")


async def test_a_long_queue_is_counted_and_not_told() -> None:
    engine = tiny_engine(config=EngineConfig(max_running=1))
    async with app_of(engine) as (running, http), anyio.create_task_group() as group:

        async def ask(number: int) -> None:
            await http.post("/v1/completions", json=ENDLESS, headers={"x-request-id": f"r{number}"})

        for number in range(30):
            group.start_soon(ask, number)
        await until(lambda: len(running.engine.open_ids) == 30)
        for params, told in (({}, 21), ({"waiting": 0}, 1), ({"waiting": 3}, 4), ({"waiting": 4096}, 30)):
            stats = (await http.get("/admin/state", params=params)).json()["stats"]
            assert (len(stats["requests"]), stats["running"], stats["waiting"]) == (told, 1, 29)
        assert (await http.get("/admin/state", params={"waiting": 4097})).status_code == 400
        for number in reversed(range(30)):  # those that are not told can be cancelled too
            assert (await http.post(f"/admin/cancel/r{number}")).status_code == 200


async def test_a_conversion_shows_in_layers_and_bytes() -> None:
    async with app_of() as (engine, http), anyio.create_task_group() as group:

        async def ask() -> None:
            await http.post("/v1/completions", json=ENDLESS)

        group.start_soon(ask)
        await until(lambda: engine.stats()["running"])
        await http.post("/admin/level", json={"level": 2})
        await until(lambda: engine.stats()["requests"][0]["level"] == 2)
        stats = (await http.get("/admin/state")).json()["stats"]
        await http.post(f"/admin/cancel/{stats['requests'][0]['id']}")
    (request,) = stats["requests"]
    assert request["converted"] == stats["order"][:2] == [2, 0]
    assert (stats["layers"], stats["max_level"], stats["adaptive"]) == (4, 3, True)
    assert 0 < stats["window_bytes"] <= stats["state_bytes"]
    assert request["memory_bytes"] > 0 and request["age_seconds"] > 0
    assert request["max_tokens"] == 4000
