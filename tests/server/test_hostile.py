"""What no client should send: each is answered in OpenAI's form or cut off, nothing is an unforeseen error, and the server
goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import re
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
from tests.server.asgi import error
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

Told = tuple[int, str | None]
"""Status of an answer, and the code of its error."""

FINE: Told = (200, None)
NO_OBJECT: Told = (400, None)
TYPE: Told = (400, "invalid_type")
VALUE: Told = (400, "invalid_value")
MISSING: Told = (400, "missing_required_parameter")
UNKNOWN: Told = (400, "unknown_parameter")
LONG: Told = (400, "context_length_exceeded")
LARGE: Told = (413, "body_too_large")
MODEL: Told = (404, "model_not_found")
TIMEOUT: Told = (504, "timeout")

PATHS = ("/v1/completions", "/v1/chat/completions", "/admin/drain")
BODIES: dict[str, tuple[bytes, Told, Told, Told]] = {
    "empty": (b"", NO_OBJECT, NO_OBJECT, FINE),
    "null": (b"null", NO_OBJECT, NO_OBJECT, FINE),
    "a number": (b"1", NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "a list": (b"[]", NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "a text": (b'"fox"', NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "cut off": (b'{"model": "tiny", "prompt": "fo', NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "two values": (b"{}{}", NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "nested lists": (b'{"model": "tiny", "prompt": ' + b"[" * 100_000, NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "nested lists that end": (
        b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}", TYPE, MISSING, UNKNOWN,
    ),
    "nested objects": (b'{"model": "tiny", "stop": ' + b'{"a":' * 100_000, NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "nested in what is compared": (
        b'{"model": "tiny", "messages": [], "tools": ' + b"[" * 900 + b"]" * 900 + b"}", MISSING, VALUE, UNKNOWN,
    ),
    "an integer of many digits": (
        b'{"model": "tiny", "prompt": "fox", "seed": ' + b"9" * 100_000 + b"}", NO_OBJECT, NO_OBJECT, NO_OBJECT,
    ),
    "an exponent": (b'{"model": "tiny", "prompt": "fox", "temperature": 1e99999}', VALUE, VALUE, UNKNOWN),
    "NaN": (b'{"model": "tiny", "prompt": "fox", "temperature": NaN}', VALUE, VALUE, UNKNOWN),
    "Infinity": (b'{"model": "tiny", "prompt": "fox", "top_p": -Infinity}', VALUE, VALUE, UNKNOWN),
    "NaN as bias": (b'{"model": "tiny", "prompt": "fox", "logit_bias": {"1": NaN}}', VALUE, MISSING, UNKNOWN),
    "half a surrogate pair": (b'{"model": "tiny", "prompt": "\\ud800"}', VALUE, MISSING, UNKNOWN),
    "half a surrogate pair as name": (
        b'{"model": "tiny", "prompt": "fox", "\\ud800": 1}', NO_OBJECT, NO_OBJECT, NO_OBJECT,
    ),
    "half a surrogate pair as model": (b'{"model": "\\udfff", "prompt": "fox"}', MODEL, MISSING, UNKNOWN),
    "one key twice": (
        b'{"model": "tiny", "prompt": "fox", "prompt": 1, "max_tokens": 1, "max_tokens": 2}', TYPE, MISSING, UNKNOWN,
    ),
    "one key ten thousand times": (
        b'{"model": "tiny"' + b', "prompt": "fox"' * 10_000 + b', "max_tokens": 1}', FINE, MISSING, UNKNOWN,
    ),
    "ten thousand unknown keys": (
        b"{" + b",".join(b'"k%d": 1' % i for i in range(10_000)) + b"}", MISSING, MISSING, UNKNOWN,
    ),
    "an unknown key of a megabyte": (b'{"' + b"k" * (1 << 20) + b'": 1}', MISSING, MISSING, UNKNOWN),
    "a hundred thousand prompts": (
        json.dumps({"model": "tiny", "prompt": ["fox"] * 100_000}).encode(), VALUE, MISSING, UNKNOWN,
    ),
    "a hundred thousand stops": (
        json.dumps({"model": "tiny", "prompt": "fox", "stop": ["fox"] * 100_000}).encode(), VALUE, VALUE, UNKNOWN,
    ),
    "ten thousand messages": (
        json.dumps({"model": "tiny", "messages": [{"role": "user", "content": ""}] * 10_000}).encode(),
        MISSING, LONG, UNKNOWN,
    ),
    "a hundred thousand biases": (
        json.dumps(GOOD["/v1/completions"] | {"logit_bias": {str(i): 1 for i in range(100_000)}}).encode(),
        VALUE, MISSING, UNKNOWN,
    ),
    "a megabyte of text": (
        json.dumps({"model": "tiny", "prompt": "fox " * (1 << 18)}).encode(), LONG, MISSING, UNKNOWN,
    ),
    "a megabyte of NUL": (b"\x00" * (1 << 20), NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "no UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe\x80"}', NO_OBJECT, NO_OBJECT, NO_OBJECT),
    "UTF-16": (json.dumps(GOOD["/v1/completions"]).encode("utf-16"), FINE, MISSING, UNKNOWN),
    "a byte order mark": (
        b"\xef\xbb\xbf" + json.dumps(GOOD["/v1/completions"]).encode(), FINE, MISSING, UNKNOWN,
    ),
    "more than a body may have": (b" " * (9 << 20), LARGE, LARGE, LARGE),
}  # fmt: skip

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON_BODY = b"Content-Type: application/json\r\n"
STREAM = json.dumps(GOOD["/v1/completions"] | {"stream": True}).encode()
FOX = json.dumps(GOOD["/v1/completions"]).encode()
WHOLE = b"Content-Length: %d\r\n\r\n%b" % (len(FOX), FOX)
WIRE: dict[str, tuple[bytes, *tuple[tuple[int, ...], ...]]] = {
    "nothing": (b"", ()),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400,)),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (403, 400)),
    "an unknown version": (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", (200,)),
    "an unknown method": (b"FOO /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,)),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", (400,)),
    "two hosts": (b"GET /admin/state HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n", (400,)),
    "a host that is none": (b"GET /admin/state HTTP/1.1\r\nHost: [::\r\n\r\n", (403,)),
    "the URL *": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "a whole URL": (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "a URL with half an escape": (b"GET /v1/models/%f HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "a URL that is no UTF-8": (b"GET /v1/models/%ed%a0%80%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "a URL with NUL": (b"GET /v1/models/%00%0d%0aX: HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "a URL of 60 KiB": (b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,), (400,)),
    "a query of 60 KiB": (
        b"GET /admin/state?events_after=" + b"9" * 60_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        (400,),
    ),
    "a way out of the folder": (b"GET /dashboard/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "an escaped way out": (b"GET /dashboard/%2e%2e/%2e%2e/app.py HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    "a header of a megabyte": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
        (400,), (),
    ),
    "ten thousand headers": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 10_000 + b"\r\n",
        (200,), (400,),
    ),
    "a header without a name": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n: 1\r\n\r\n", (400,)),
    "a header that is no text": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \xff\xfe\r\nAuthorization: \xff\r\n\r\n",
        (200,),
    ),
    "a header with NUL": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n", (400,)),
    "a folded header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: 1\r\n 2\r\n\r\n", (200,)),
    "an id that forges a line": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\rb\r\n\r\n", (400,)),
    "an Accept that is none": (
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: ;;;q=x,\xff/*;version=1.0.0;escaping=\r\n\r\n",
        (200,),
    ),
    "an upgrade": (
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        (200,),
    ),
    "100-continue": (HEAD + JSON_BODY + b"Expect: 100-continue\r\nContent-Length: 4\r\n\r\nnull", (100, 400)),
    "a negative length": (HEAD + JSON_BODY + b"Content-Length: -1\r\n\r\n", (400,)),
    "a length that is no number": (HEAD + JSON_BODY + b"Content-Length: ten\r\n\r\n", (400,)),
    "an endless length": (HEAD + JSON_BODY + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", (400,)),
    "two lengths": (HEAD + JSON_BODY + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nnull", (400,)),
    "a length and chunks": (
        HEAD + JSON_BODY + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "an unknown encoding": (HEAD + JSON_BODY + b"Transfer-Encoding: fox\r\n\r\nnull", (400,)),
    "a body shorter than its length": (HEAD + JSON_BODY + b"Content-Length: 100\r\n\r\n{", (408,)),
    "chunks that break off": (HEAD + JSON_BODY + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"mo", (408,)),
    "a chunk without a size": (HEAD + JSON_BODY + b"Transfer-Encoding: chunked\r\n\r\nfox\r\n", (400,)),
    "a chunk of a negative size": (HEAD + JSON_BODY + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", (400,)),
    "a chunk of an endless size": (
        HEAD + JSON_BODY + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\nx",
        (400,),
    ),
    "a body after a GET": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nnull", (200,)),
    "two requests, the first streams": (
        HEAD + JSON_BODY + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM
        + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        (200, 200),
    ),
    "a hundred requests": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, (200,) * 100),
    "a host of another site": (HEAD.replace(b"localhost", b"evil.example") + JSON_BODY + WHOLE, (403,)),
    "no host, as HTTP/1.0 may": (b"GET /v1/models HTTP/1.0\r\n\r\n", (403,)),
    "a body without a type": (HEAD + WHOLE, (400,)),
    "a body with a type": (HEAD + JSON_BODY + WHOLE, (200,)),
}  # fmt: skip
"""What is sent, and the statuses of all answers to it; two lists where it depends on how many bytes come at once."""

TYPES = {
    "text/plain": NO_OBJECT,
    "application/x-www-form-urlencoded": NO_OBJECT,
    "multipart/form-data; boundary=x": NO_OBJECT,
    "application/json; charset=x": FINE,
}


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


def told(response: httpx.Response) -> Told:
    """What an answer says: errors have OpenAI's form."""
    return FINE if response.status_code == 200 else error(response)


@pytest.mark.parametrize(("body", "expected"), [(body, told) for body, *told in BODIES.values()], ids=BODIES.keys())
def test_bodies(site: Site, body: bytes, expected: list[Told]) -> None:
    with httpx.Client(base_url=site.address, timeout=20) as http:
        for path, what in zip(PATHS, expected, strict=True):
            try:
                assert told(http.post(path, content=body, headers={"Content-Type": JSON})) == what, path
            except httpx.WriteError:
                assert what == LARGE, "it was refused before all of it was there"
            http.post("/admin/drain", json={"draining": False}).raise_for_status()


@pytest.mark.parametrize("path", FIELDS)
def test_wrong_types_everywhere(site: Site, path: str) -> None:
    with httpx.Client(base_url=site.address, timeout=20) as http:
        for field in FIELDS[path].model_fields:
            for value in VALUES:
                body = json.dumps(GOOD[path] | {field: value}).encode()
                found = told(http.post(path, content=body, headers={"Content-Type": JSON}))
                assert found in (FINE, MODEL, TIMEOUT) or found[0] == 400, (field, value)
        if path == "/admin/drain":
            http.post(path, json={"draining": False}).raise_for_status()


@pytest.mark.parametrize(("kind", "expected"), TYPES.items())
@pytest.mark.parametrize("path", GOOD)
def test_content_types(site: Site, path: str, kind: str, expected: Told) -> None:
    body, headers = json.dumps(GOOD[path]).encode(), {"Content-Type": kind, "Content-Encoding": "gzip"}
    assert told(httpx.post(site.address + path, content=body, headers=headers)) == expected


GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


@pytest.mark.parametrize(("sent", "expected"), [(sent, each) for sent, *each in WIRE.values()], ids=WIRE.keys())
def test_what_is_on_the_wire(site: Site, sent: bytes, expected: list[tuple[int, ...]]) -> None:
    host, _, port = site.address.removeprefix("http://").partition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=20) as client:
        try:
            client.sendall(sent)
            # A client that has nothing more to send has left, and may not be answered.
            while len(STATUS.findall(answer)) < len(expected[0]) and (part := client.recv(1 << 16)):
                answer += part
            client.shutdown(socket.SHUT_WR)
            answer += b"".join(iter(lambda: client.recv(1 << 16), b""))
        except OSError as gone:
            assert gone.errno in GONE, gone  # cut off in the middle of what it sent
    assert tuple(map(int, STATUS.findall(answer))) in expected, answer[:200]
    assert b"Traceback" not in answer and b"root:" not in answer
