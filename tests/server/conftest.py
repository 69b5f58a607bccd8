"""A server of a tiny model on a free port, for all tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from dsla.engine import AsyncEngine
from tests.server.site import Site

MODEL = "tiny/model"


@dataclass
class Served:
    """A running server and clients of it."""

    engine: AsyncEngine
    address: str
    http: httpx.Client
    client: openai.OpenAI

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.http.get("/admin/state").json()["stats"]
        return stats

    def wait_until_idle(self, seconds: float = 2.0) -> None:
        """Waits until no request is open and all memory is free."""
        end = time.monotonic() + seconds
        while (stats := self.stats())["running"] or stats["waiting"]:
            assert time.monotonic() < end, f"requests still open: {stats['requests']}"
            time.sleep(0.01)
        assert stats["free_bytes"] == stats["budget_bytes"]


@contextmanager
def serving(tokenizer: PreTrainedTokenizerFast | None = None) -> Iterator[Served]:
    """A server of the tiny model on a free port, whose tokens are those of `tokenizer`."""
    with Site(MODEL, tokenizer=tokenizer) as site, httpx.Client(base_url=site.address, timeout=20) as http:
        client = openai.OpenAI(base_url=f"{site.address}/v1", api_key="none", max_retries=0)
        yield Served(site.engine, site.address, http, client)


@pytest.fixture(scope="package")
def _running() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def served(_running: Served) -> Iterator[Served]:
    """The server; after each test it must be alive and empty."""
    yield _running
    _running.wait_until_idle()
    assert _running.http.get("/health").json() == {"status": "ok"}
    _running.http.post("/admin/level", json={"level": None}).raise_for_status()
