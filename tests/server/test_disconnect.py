"""A client that goes away frees its request and all its memory, wherever the request is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.conftest import MODEL, Served

LONG: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4000, "ignore_eos": True}


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def cancelled(served: Served) -> int:
    count: int = served.stats()["finished"].get("cancel", 0)
    return count


def leave_while_waiting(served: Served, body: dict[str, Any], requests: int) -> None:
    """Sends a request, waits until the engine has its prompts, and closes the connection before any answer."""
    client = httpx.Client(base_url=served.address, timeout=30)

    def post() -> None:
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            client.post("/v1/completions", json=body)

    thread = threading.Thread(target=post)
    thread.start()
    until(lambda: len(served.stats()["requests"]) == requests)
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        connection._connection._network_stream._sock.shutdown(2)
    thread.join()
    client.close()


@pytest.mark.parametrize("prompts", [1, 3])
def test_leaving_before_the_answer(served: Served, prompts: int) -> None:
    before = cancelled(served)
    leave_while_waiting(served, LONG | {"prompt": ["fox"] * prompts}, prompts)
    until(lambda: cancelled(served) == before + prompts)
    assert [event["reason"] for event in served.stats()["events"] if event["kind"] == "cancel"][-1] == "client left"


@pytest.mark.parametrize("prompts", [1, 3])
def test_leaving_in_the_middle_of_a_stream(served: Served, prompts: int) -> None:
    before = cancelled(served)
    body = LONG | {"prompt": ["fox"] * prompts, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    until(lambda: cancelled(served) == before + prompts)


def test_many_leave_and_those_that_stay_get_everything(served: Served) -> None:
    body = LONG | {"max_tokens": 60, "temperature": 0}
    expected = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    results: list[str] = []

    def stay() -> None:
        results.append(
            httpx.post(f"{served.address}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]
        )

    def leave() -> None:
        with httpx.stream(
            "POST", f"{served.address}/v1/completions", json=LONG | {"stream": True}, timeout=30
        ) as response:
            next(response.iter_lines())

    threads = [threading.Thread(target=target) for target in (stay, leave) * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_frees_the_request_at_once_and_counts_as_its_end(served: Served, stream: bool) -> None:
    body = LONG | {"temperature": 0}
    text = served.http.post("/v1/completions", json=body | {"max_tokens": 40}).json()["choices"][0]["text"]
    before = served.stats()
    answer = served.http.post("/v1/completions", json=body | {"stop": text[20:24], "stream": stream})
    assert '"finish_reason":"stop"' in answer.text
    served.wait_until_idle()
    after = served.stats()
    ended = {name: count - before["finished"].get(name, 0) for name, count in after["finished"].items()}
    assert {name: count for name, count in ended.items() if count} == {"stop": 1}
    assert after["events"][-1]["reason"] == "stop"
    for name in ("e2e", "tpot"):
        assert sum(after["times"][name]["counts"]) == sum(before["times"][name]["counts"]) + 1
    assert after["generated_tokens"] - before["generated_tokens"] < 1000
