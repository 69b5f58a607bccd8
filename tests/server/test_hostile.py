"""What no client should send: each is answered in OpenAI's form or cut off, nothing is an unforeseen error, and the server
goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dsla.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    DrainRequest,
    TokenizeRequest,
)
from tests.server.site import Site

JSON = "application/json"
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "fox", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2},
    "/tokenize": {"prompt": "fox"},
    "/detokenize": {"tokens": [1, 2]},
    "/admin/level": {"level": None},
    "/admin/drain": {"draining": False},
}
FIELDS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/admin/drain": DrainRequest,
}
HUGE = 10**400
VALUES: list[Any] = [
    None, True, -1, 0.5, 1e308, HUGE, "", "\ud800\x00", [], [[]], [None] * 3, [HUGE], ["\udfff"], {}, {"": None}, {"1": HUGE},
    {"1": -1e308}, {"type": "x"}, {"quality": HUGE}, {"max_level": HUGE},
    [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], [{"role": "system", "content": ""}] * 3,
]  # fmt: skip

BODIES: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "a text": b'"fox"',
    "cut off": b'{"model": "tiny", "prompt": "fo',
    "two values": b"{}{}",
    "nested lists": b'{"model": "tiny", "prompt": ' + b"[" * 100_000,
    "nested lists that end": b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "nested objects": b'{"model": "tiny", "stop": ' + b'{"a":' * 100_000,
    "nested in what is compared": b'{"model": "tiny", "messages": [], "tools": ' + b"[" * 900 + b"]" * 900 + b"}",
    "an integer of many digits": b'{"model": "tiny", "prompt": "fox", "seed": ' + b"9" * 100_000 + b"}",
    "an exponent": b'{"model": "tiny", "prompt": "fox", "temperature": 1e99999}',
    "NaN": b'{"model": "tiny", "prompt": "fox", "temperature": NaN}',
    "Infinity": b'{"model": "tiny", "prompt": "fox", "top_p": -Infinity}',
    "NaN as bias": b'{"model": "tiny", "prompt": "fox", "logit_bias": {"1": NaN}}',
    "half a surrogate pair": b'{"model": "tiny", "prompt": "\\ud800"}',
    "half a surrogate pair as name": b'{"model": "tiny", "prompt": "fox", "\\ud800": 1}',
    "half a surrogate pair as model": b'{"model": "\\udfff", "prompt": "fox"}',
    "one key twice": b'{"model": "tiny", "prompt": "fox", "prompt": 1, "max_tokens": 1, "max_tokens": 2}',
    "one key ten thousand times": b'{"model": "tiny"' + b', "prompt": "fox"' * 10_000 + b', "max_tokens": 1}',
    "ten thousand unknown keys": b"{" + b",".join(b'"k%d": 1' % i for i in range(10_000)) + b"}",
    "an unknown key of a megabyte": b'{"' + b"k" * (1 << 20) + b'": 1}',
    "a hundred thousand prompts": json.dumps({"model": "tiny", "prompt": ["fox"] * 100_000}).encode(),
    "a hundred thousand stops": json.dumps({"model": "tiny", "prompt": "fox", "stop": ["fox"] * 100_000}).encode(),
    "ten thousand messages": json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": ""}] * 10_000}
    ).encode(),
    "a hundred thousand biases": json.dumps(
        {"model": "tiny", "prompt": "fox", "max_tokens": 1, "logit_bias": {str(i): 1 for i in range(100_000)}}
    ).encode(),
    "a megabyte of text": json.dumps({"model": "tiny", "prompt": "fox " * (1 << 18)}).encode(),
    "a megabyte of NUL": b"\x00" * (1 << 20),
    "no UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe\x80"}',
    "UTF-16": json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 1}).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 1}).encode(),
    "more than a body may have": b" " * (9 << 20),
}

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
TYPE = b"Content-Type: application/json\r\n"
STREAM = json.dumps(GOOD["/v1/completions"] | {"stream": True}).encode()
WIRE: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown version": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "an unknown method": b"FOO /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /admin/state HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
    "a host that is none": b"GET /admin/state HTTP/1.1\r\nHost: [::\r\n\r\n",
    "the URL *": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "a whole URL": b"GET http://evil.example/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URL with half an escape": b"GET /v1/models/%f HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URL that is no UTF-8": b"GET /v1/models/%ed%a0%80%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URL with NUL": b"GET /v1/models/%00%0d%0aX: HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URL of 60 KiB": b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a query of 60 KiB": b"GET /admin/state?events_after=" + b"9" * 60_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a way out of the folder": b"GET /dashboard/../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "an escaped way out": b"GET /dashboard/%2e%2e/%2e%2e/app.py HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header of a megabyte": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "ten thousand headers": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: 1\r\n" * 10_000 + b"\r\n",
    "a header without a name": b"GET /health HTTP/1.1\r\nHost: x\r\n: 1\r\n\r\n",
    "a header that is no text": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\nAuthorization: \xff\r\n\r\n",
    "a header with NUL": b"GET /health HTTP/1.1\r\nHost: x\r\nX: \x00\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: x\r\nX: 1\r\n 2\r\n\r\n",
    "an id that forges a line": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\rb\r\n\r\n",
    "an Accept that is none": b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: ;;;q=x,\xff/*;version=1.0.0;escaping=\r\n\r\n",
    "an upgrade": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "100-continue": HEAD + TYPE + b"Expect: 100-continue\r\nContent-Length: 4\r\n\r\nnull",
    "a negative length": HEAD + TYPE + b"Content-Length: -1\r\n\r\n",
    "a length that is no number": HEAD + TYPE + b"Content-Length: ten\r\n\r\n",
    "an endless length": HEAD + TYPE + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "two lengths": HEAD + TYPE + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nnull",
    "a length and chunks": HEAD + TYPE + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown encoding": HEAD + TYPE + b"Transfer-Encoding: fox\r\n\r\nnull",
    "a body shorter than its length": HEAD + TYPE + b"Content-Length: 100\r\n\r\n{",
    "chunks that break off": HEAD + TYPE + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"mo",
    "a chunk without a size": HEAD + TYPE + b"Transfer-Encoding: chunked\r\n\r\nfox\r\n",
    "a chunk of a negative size": HEAD + TYPE + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a chunk of an endless size": HEAD + TYPE + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\nx",
    "a body after a GET": b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nnull",
    "two requests, the first streams": HEAD + TYPE + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM
    + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a hundred requests": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100,
}  # fmt: skip

TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/json; charset=x",
]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A server that gives no request much time."""
    with Site(request_seconds=2.0) as site:
        yield site


@pytest.fixture(autouse=True)
def goes_on(site: Site, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Afterwards the server is well, has logged no failure, and has nothing open."""
    yield
    with httpx.Client(base_url=site.address, timeout=20) as http:
        assert http.post("/v1/completions", json=GOOD["/v1/completions"]).status_code == 200
        stats = http.get("/admin/state").json()["stats"]
    assert (stats["running"], stats["waiting"], stats["state"]) == (0, 0, "ready")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def assert_told(response: httpx.Response) -> None:
    """It is an answer, or an error of the client's in OpenAI's form."""
    assert response.status_code < 500 or response.json()["error"]["code"] == "timeout", response.text
    if response.status_code >= 400:
        assert response.json()["error"]["message"], response.text


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_bodies(site: Site, body: bytes) -> None:
    with httpx.Client(base_url=site.address, timeout=20) as http:
        for path in ("/v1/completions", "/v1/chat/completions", "/admin/drain"):
            try:
                assert_told(http.post(path, content=body, headers={"Content-Type": JSON}))
            except httpx.WriteError:
                assert len(body) > 8 << 20, "it was refused before all of it was there"
            http.post("/admin/drain", json={"draining": False}).raise_for_status()


@pytest.mark.parametrize("path", FIELDS)
def test_wrong_types_everywhere(site: Site, path: str) -> None:
    with httpx.Client(base_url=site.address, timeout=20) as http:
        for field in FIELDS[path].model_fields:
            for value in VALUES:
                body = json.dumps(GOOD[path] | {field: value}).encode()
                assert_told(http.post(path, content=body, headers={"Content-Type": JSON}))
        if path == "/admin/drain":
            http.post(path, json={"draining": False}).raise_for_status()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("path", GOOD)
def test_content_types(site: Site, path: str, kind: str) -> None:
    body = json.dumps(GOOD[path]).encode()
    assert_told(
        httpx.post(site.address + path, content=body, headers={"Content-Type": kind, "Content-Encoding": "gzip"})
    )


GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


@pytest.mark.parametrize("sent", WIRE.values(), ids=WIRE.keys())
def test_what_is_on_the_wire(site: Site, sent: bytes) -> None:
    host, _, port = site.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except OSError as error:
            assert error.errno in GONE, error
            return  # cut off in the middle of what it sent
    assert not answer or answer.startswith((b"HTTP/1.1 1", b"HTTP/1.1 2", b"HTTP/1.1 4")), answer[:200]
    assert b"Traceback" not in answer and b"root:" not in answer
