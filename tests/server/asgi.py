"""The application without a server around it: for what needs an engine or settings of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx

from dsla.engine import AsyncEngine, Engine
from dsla.server.app import build_app
from dsla.server.settings import ServerSettings
from tests.server.conftest import MODEL
from tests.server.tiny import tiny_engine, tiny_tokenizer

BODY: dict[str, Any] = {"model": MODEL, "prompt": "fox", "max_tokens": 2}
ENDLESS: dict[str, Any] = {**BODY, "max_tokens": 4000, "ignore_eos": True}


@asynccontextmanager
async def app_of(
    engine: Engine | None = None, client: str = "127.0.0.1", **settings: Any
) -> AsyncIterator[tuple[AsyncEngine, httpx.AsyncClient]]:
    """A running engine (default: a tiny one) and a client of the application on it, which connects from `client`."""
    running = AsyncEngine(engine or tiny_engine())
    app = build_app(running, tiny_tokenizer(), MODEL, ServerSettings(**settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(client, 1))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=20) as http:
            yield running, http
    finally:
        await anyio.to_thread.run_sync(running.close)


async def until(condition: Any) -> None:
    """Waits until something is so."""
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.005)


def error(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an answer that is an error in OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return response.status_code, body["error"]["code"]
