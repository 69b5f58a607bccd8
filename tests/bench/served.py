"""A server of the tiny model on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dsla.engine import AsyncEngine
from dsla.server.app import build_app
from dsla.server.run import bind, server, url
from dsla.server.settings import ServerSettings
from tests.server.tiny import tiny_engine, tiny_tokenizer

VOCABULARY = 300


@contextmanager
def running(model: str = "tiny", settings: ServerSettings | None = None) -> Iterator[str]:
    """Serves the tiny model under a name; its address."""
    sock = bind("127.0.0.1", 0)
    runner = server(build_app(AsyncEngine(tiny_engine()), tiny_tokenizer(), model, settings))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [sock]})
    thread.start()
    yield url(sock)
    runner.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
