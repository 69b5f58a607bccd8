"""A server of the tiny model on a free port, which can be stopped and started again at the same address."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx
from transformers import PreTrainedTokenizerFast

from dsla.engine import AsyncEngine, Engine
from dsla.server.app import build_app
from dsla.server.run import bind, server, url
from dsla.server.settings import ServerSettings
from tests.server.tiny import tiny_engine, tiny_tokenizer

VOCABULARY = 300
"""Token ids below it are known to the tiny model."""


class Site:
    """A server in a thread of this process, from `start` or the beginning of a `with` block to `stop` or its end.

    Args:
        model: name of its model.
        engine: makes its engine at every start.
        tokenizer: of the model; default: `tiny_tokenizer`.
        settings: of the HTTP side, as `ServerSettings` has them.

    Attributes:
        address: where it answers, since it was started first.
        engine: the engine that runs now.
    """

    def __init__(
        self,
        model: str = "tiny",
        engine: Callable[[], Engine] = tiny_engine,
        tokenizer: PreTrainedTokenizerFast | None = None,
        **settings: Any,
    ) -> None:
        self.model, self._make, self._settings, self._port = model, engine, ServerSettings(**settings), 0
        self._tokenizer = tokenizer or tiny_tokenizer()

    def start(self) -> None:
        """Serves a new engine."""
        sock = bind("127.0.0.1", self._port)
        self._port, self.address = sock.getsockname()[1], url(sock)
        self.engine = AsyncEngine(self._make())
        self._runner = server(build_app(self.engine, self._tokenizer, self.model, self._settings))
        self._thread = threading.Thread(target=self._runner.run, kwargs={"sockets": [sock]})
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._runner.server_state.connections)

    def restart(self) -> None:
        """Does what a signal does, so that open answers come to their ends, and serves a new engine."""
        self._runner.handle_exit(signal.SIGTERM, None)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.start()

    def stop(self) -> None:
        """Ends the server at once, whatever is open."""
        self.engine.close()
        self._runner.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    @contextmanager
    def request(self, name: str, tokens: int = 4000, **fields: Any) -> Iterator[None]:
        """A request that runs meanwhile."""
        body = {"model": self.model, "prompt": "the quick brown fox", "max_tokens": tokens, "ignore_eos": True}
        with (
            httpx.Client(base_url=self.address, timeout=20) as http,
            http.stream(
                "POST", "/v1/completions", json=body | {"stream": True} | fields, headers={"x-request-id": name}
            ) as response,
        ):
            lines = response.iter_lines()  # the connection is closed with it
            next(lines)
            yield

    def __enter__(self) -> Site:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
