"""Clients that are too slow lose their connection, and only they."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from dsla.server import connection
from tests.server.site import Site

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server with little patience."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connection, "TAKE_SECONDS", 0.3)
    with Site() as site:
        yield site


def connected(site: Site) -> socket.socket:
    host, _, port = site.address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_head_that_never_ends_is_cut_off(hasty: Site) -> None:
    begun = time.monotonic()
    with connected(hasty) as silent, connected(hasty) as slow:
        slow.sendall(HEAD)
        for _ in range(3):
            time.sleep(0.05)
            slow.sendall(b"X-Slow: 1\r\n")
        assert silent.recv(100) == slow.recv(100) == b""
    assert 0.25 < time.monotonic() - begun < 5
    assert httpx.get(f"{hasty.address}/health").status_code == 200


def test_a_second_head_has_its_own_time(hasty: Site) -> None:
    with connected(hasty) as client:
        for _ in range(2):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += client.recv(1000)
            time.sleep(0.2)
        client.sendall(b"GET /health HTTP/1.1\r\n")
        begun = time.monotonic()
        assert client.recv(100) == b""
        assert 0.2 < time.monotonic() - begun < 5


def test_a_request_that_takes_longer_than_its_head_may_is_answered(hasty: Site) -> None:
    with connected(hasty) as client:
        content = b'{"model": "tiny", "prompt": "fox", "max_tokens": 2}'
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content))
        time.sleep(0.5)
        client.sendall(content)
        assert b"200 OK" in client.recv(10_000)


def test_a_client_that_takes_nothing_is_cut_off(hasty: Site) -> None:
    texts = 600_000  # of 13 bytes each: more than all buffers on the way hold
    with connected(hasty) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        content = b'{"tokens": [0' + b",0" * (texts - 1) + b"]}"
        client.sendall(HEAD.replace(b"/v1/completions", b"/detokenize") + b"Content-Length: %d\r\n\r\n" % len(content))
        client.sendall(content)
        assert client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        assert hasty.connections == 1
        end = time.monotonic() + 10
        while hasty.connections:
            assert time.monotonic() < end, "it is still waited for"
            time.sleep(0.02)
    assert httpx.get(f"{hasty.address}/health").status_code == 200
