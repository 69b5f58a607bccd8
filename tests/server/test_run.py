"""Ports: in use, impossible, free."""

from __future__ import annotations

import socket

import pytest

from dsla.errors import ConfigError
from dsla.server.run import bind, url


def test_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            bind("127.0.0.1", port)


def test_a_port_can_be_taken_again_at_once() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            sock.accept()[0].close()
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", ""], ids=str)
def test_impossible_hosts(host: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on"):
        bind(host, 0)


def test_url() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_url_of_version_6() -> None:
    try:
        sock = bind("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with sock:
        assert url(sock) == f"http://[::1]:{sock.getsockname()[1]}"
