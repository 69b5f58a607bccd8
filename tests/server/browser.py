"""A headless Chromium, and servers to point it at that can be stopped and started again."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from dsla.engine import AsyncEngine, Engine
from dsla.server.app import build_app
from dsla.server.run import bind, server, url
from dsla.server.settings import ServerSettings
from tests.server.conftest import MODEL
from tests.server.tiny import tiny_engine, tiny_tokenizer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

STEP_SECONDS = 0.02


def slow_engine() -> Engine:
    """An engine that takes its time, so that there is something to watch."""
    engine = tiny_engine()
    step = engine.step

    def slow() -> Any:
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    return engine


class Site:
    """A server that can be stopped and started again at the same address.

    Args:
        model: name of its model.
        settings: of the server.
    """

    def __init__(self, model: str = MODEL, **settings: Any) -> None:
        self._model, self._settings, self._port = model, ServerSettings(**settings), 0
        self.start()

    def start(self) -> None:
        """Serves a new engine."""
        self.engine = AsyncEngine(slow_engine())
        sock = bind("127.0.0.1", self._port)
        self._port, self.address = sock.getsockname()[1], url(sock)
        self._runner = server(build_app(self.engine, tiny_tokenizer(), self._model, self._settings))
        self._thread = threading.Thread(target=self._runner.run, kwargs={"sockets": [sock]})
        self._thread.start()

    def stop(self) -> None:
        """Ends the server at once, whatever is open."""
        self.engine.close()
        self._runner.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    @contextmanager
    def request(self, name: str, tokens: int = 4000, **fields: Any) -> Iterator[None]:
        """A request that runs meanwhile."""
        body = {"model": self._model, "prompt": "the quick brown fox", "max_tokens": tokens, "ignore_eos": True}
        with (
            httpx.Client(base_url=self.address, timeout=20) as http,
            http.stream(
                "POST", "/v1/completions", json=body | {"stream": True} | fields, headers={"x-request-id": name}
            ) as response,
        ):
            lines = response.iter_lines()  # the connection is closed with it
            next(lines)
            yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A server without keys."""
    running = Site()
    yield running
    running.stop()
