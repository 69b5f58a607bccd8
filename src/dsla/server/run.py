"""Holding a port, and serving an application on it."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import uvicorn

from dsla.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

_BACKLOG = 2048
_DRAIN_SECONDS = 10


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


def server(app: FastAPI) -> uvicorn.Server:
    """A server of `app`; `server(app).run(sockets=[bind(...)])` serves until a signal comes.

    After the signal open answers have some seconds to end.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_DRAIN_SECONDS
    )
    return uvicorn.Server(config)


def _bind_message(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop the program that holds it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs rights this user does not have: choose one above 1023 with --port"
    return f"cannot listen on {host}, port {port}: {error.strerror or error}"
