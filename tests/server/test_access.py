"""What every answer has (an id, security headers), and what the log says of it and does not."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from dsla.server.access import HEADERS, QUIET
from tests.server.asgi import BODY, ENDLESS, app_of, error
from tests.server.conftest import MODEL, Served

SECRET = "correct horse"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def line(caplog: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    """Fields of the access log's line of a request, which comes when its client has the answer already."""
    end = time.monotonic() + 5
    while True:
        for record in caplog.records:
            fields: dict[str, Any] = getattr(record, "fields", {})
            if fields.get("request_id") == request_id and "path" in fields:
                return fields | {"message": record.getMessage()}
        assert time.monotonic() < end, "there is no such line"
        time.sleep(0.005)


@contextmanager
def streaming(served: Served, request_id: str, **fields: Any) -> Iterator[None]:
    """While an answer of this id streams, of which the client has the first line."""
    headers = {"x-request-id": request_id}
    body = ENDLESS | {"stream": True} | fields
    with served.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()  # with the last reference to it the connection ends
        next(lines)
        yield


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/openapi.json", None, 200),
        ("POST", "/v1/completions", json.dumps(BODY | {"stream": True}), 200),
        ("POST", "/v1/completions", "{", 400),
        ("GET", "/nothing", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", "x" * 300, 413),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_every_answer_has_an_id_and_security_headers(
    method: str, path: str, content: str | None, status: int
) -> None:
    async with app_of(max_body_bytes=200) as (_, http):
        response = await http.request(method, path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert len(response.headers["x-request-id"]) == 32
    assert {name: response.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.anyio
async def test_answers_of_the_gate_and_of_an_unforeseen_error_have_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with app_of(api_keys=("key",)) as (engine, http):
        refused = await http.post("/v1/completions", json=BODY)

        def generate(*args: Any, **kwargs: Any) -> None:
            raise ValueError(SECRET)

        monkeypatch.setattr(engine, "generate", generate)
        failed = await http.post("/v1/completions", json=BODY, headers={"authorization": "Bearer key"})
    assert (refused.status_code, error(failed)) == (401, (500, "internal_error"))
    for response in (refused, failed):
        assert "x-request-id" in response.headers
        assert {name: response.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize("given", ["a", "3f2504e0-4f89-41d3-9a0c-0305e82c3301", "trace:1.2_3", "x" * 64])
def test_a_well_formed_id_of_the_client_is_kept(served: Served, given: str) -> None:
    assert served.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a~1", "<script>", "é", 'a"b', "a\tb"], ids=repr)
def test_any_other_id_is_replaced(served: Served, given: str) -> None:
    found = served.http.get("/health", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert found != given and len(found) == 32 and found.isalnum()


def test_the_engine_names_requests_by_it(served: Served) -> None:
    with streaming(served, "mine", n=2):
        names = [request["id"] for request in served.stats()["requests"]]
    assert len(names) == 2 and all(name.startswith("mine~") for name in names)


def test_two_open_requests_may_have_one_id(served: Served) -> None:
    headers = {"x-request-id": "twice"}
    with streaming(served, "twice"):
        assert httpx.post(f"{served.address}/v1/completions", json=BODY, headers=headers).status_code == 200
        assert len(served.stats()["requests"]) == 1


def test_the_access_line(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsla")
    for name, stream in (("whole", False), ("stream", True)):
        body = {"model": MODEL, "prompt": [SECRET, SECRET], "max_tokens": 3, "ignore_eos": True, "stream": stream}
        served.http.post("/v1/completions?secret=1", json=body, headers={"x-request-id": name})
        found = line(caplog, name)
        assert 0 < found.pop("seconds") < 20
        assert found.pop("prompt_tokens") > 4
        assert found.pop("message").startswith("POST /v1/completions 200, ")
        assert found == {
            "request_id": name, "caller": "anyone", "method": "POST", "path": "/v1/completions", "status": 200,
            "completion_tokens": 6, "complete": True,
        }  # fmt: skip
    served.http.get("/v1/models", headers={"x-request-id": "models"})
    assert line(caplog, "models")["completion_tokens"] == 0
    assert SECRET not in caplog.text and "secret" not in caplog.text


def test_lines_of_probes_are_for_debugging(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsla")
    for path in QUIET:
        served.http.get(path)
    served.http.get("/v1/models", headers={"x-request-id": "models"})
    line(caplog, "models")
    assert not [record for record in caplog.records if getattr(record, "fields", {}).get("path") in QUIET]
    caplog.set_level(logging.DEBUG, "dsla")
    served.http.get("/health", headers={"x-request-id": "probe"})
    assert line(caplog, "probe")["path"] == "/health"


def test_a_path_cannot_forge_lines(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsla")
    served.http.get("/x%0Aforged%1b[31m" + "y" * 500, headers={"x-request-id": "forger"})
    found = line(caplog, "forger")
    assert found["path"].startswith(r"/x\nforged\x1b[31m")
    assert len(found["path"]) == 200
    assert "\n" not in found["message"]


def test_a_client_that_leaves_is_seen(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsla")
    with streaming(served, "left"):
        pass
    found = line(caplog, "left")
    assert not found["complete"] and found["message"].endswith("cut off")


@pytest.mark.anyio
async def test_the_key_of_a_caller_is_named_and_not_written(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsla")
    async with app_of(api_keys=("first", "second"), admin_key="third") as (_, http):
        await http.get("/v1/models", headers={"authorization": "Bearer second", "x-request-id": "a"})
        assert line(caplog, "a")["caller"] == "key 2"
        await http.get("/v1/models", headers={"authorization": "Bearer wrong", "x-request-id": "b"})
        found = line(caplog, "b")
        assert (found["caller"], found["status"]) == ("anyone", 401)
        await http.get("/admin/state", headers={"authorization": "Bearer first", "x-request-id": "c"})
        found = line(caplog, "c")
        assert (found["caller"], found["status"]) == ("key 1", 403)
    assert "second" not in caplog.text and "wrong" not in caplog.text
