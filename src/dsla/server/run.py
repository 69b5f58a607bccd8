"""Holding a port, and serving an application on it."""

from __future__ import annotations

import asyncio
import errno
import math
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from dsla.errors import ConfigError
from dsla.server.connection import Connection

if TYPE_CHECKING:
    from fastapi import FastAPI

    from dsla.engine import AsyncEngine

DRAIN_SECONDS = 10.0
"""Time that open answers get to end when the server is stopped."""

_BACKLOG = 2048
_ERROR_SECONDS = 5
_TICK_SECONDS = 0.05


def bind(host: str, port: int) -> socket.socket:
    """Takes a port, before anything slow is done. Connections wait until `serve` answers them.

    Args:
        host: name or address to listen on.
        port: 0 = any free one.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError):
        raise ConfigError(f"cannot listen on host {host!r}: give --host an address of this machine") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(_bind_message(error, host, port)) from None
    return sock


def url(sock: socket.socket) -> str:
    """Where a bound socket can be reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Stops in three stages: no new connections; some seconds for open answers to end; an error to those that did not.

    A second signal ends the second stage.

    Args:
        app: the application, made by `build_app`.
        on_drain: called with the number of open requests when a signal comes.
        drain_seconds: time of the second stage, at most.
    """

    def __init__(self, app: FastAPI, on_drain: Callable[[int], None], drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(drain_seconds) + _ERROR_SECONDS,
            )
        )
        self._engine: AsyncEngine = app.state.engine
        self._on_drain, self._drain_seconds, self._hurry = on_drain, drain_seconds, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        if self.should_exit:
            self._hurry = True
        else:
            self._engine.drain()
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains and stops."""
        stats = self._engine.stats(events_after=None, most_waiting=0)
        self._on_drain(stats["running"] + stats["waiting"])
        closing = asyncio.create_task(self._close_engine())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    async def _close_engine(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        while loop.time() < end and not self._hurry:
            await asyncio.sleep(_TICK_SECONDS)
        await asyncio.to_thread(self._engine.close)


def server(
    app: FastAPI, on_drain: Callable[[int], None] = lambda requests: None, drain_seconds: float = DRAIN_SECONDS
) -> uvicorn.Server:
    """A server of `app`; `server(app).run(sockets=[bind(...)])` serves until a signal comes, and drains then."""
    return DrainingServer(app, on_drain, drain_seconds)


def _bind_message(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop the program that holds it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs rights this user does not have: choose one above 1023 with --port"
    return f"cannot listen on {host}, port {port}: {error.strerror or error}"
