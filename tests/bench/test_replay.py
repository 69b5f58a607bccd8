"""Replays against a server of a tiny model, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from dsla.bench.goodput import Objectives, Outcome
from dsla.bench.replay import Server, find_server, replay
from dsla.bench.sweep import Rate, Setting, matched, plan, record, sweep
from dsla.bench.trace import TraceRequest, fit
from dsla.errors import ConfigError
from tests.server.site import VOCABULARY, Site

TRACE = [TraceRequest(0.1 * i, 20 + 9 * i, 6 + i, (0,) if i % 2 else ()) for i in range(6)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Site() as site:
        yield site.address


def find(url: str, **options: Any) -> Server:
    return asyncio.run(find_server(url, VOCABULARY, **options))


def sent(server: Server, trace: list[TraceRequest], timeout: float = 20.0) -> list[Outcome]:
    outcomes: list[Outcome] = []
    asyncio.run(replay(server, trace, (0,), VOCABULARY, timeout, outcomes, lambda open_requests: None))
    return outcomes


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_finds_what_a_server_has_and_takes(address: str, suffix: str) -> None:
    server = find(address + suffix)
    assert (server.url, server.model, server.max_tokens) == (address, "tiny", 4096)
    assert server.extras == {"ignore_eos": True, "stream_options": {"include_usage": True}}


def test_every_request_is_answered_whole(address: str) -> None:
    outcomes = sorted(sent(find(address), TRACE), key=lambda outcome: outcome.due)
    assert [outcome.status for outcome in outcomes] == ["done"] * len(TRACE)
    for outcome, request in zip(outcomes, TRACE, strict=True):
        assert outcome.output_tokens == outcome.wanted_tokens == request.output_tokens
        assert outcome.due == request.at <= outcome.sent <= outcome.arrivals[0] <= outcome.ended
        assert outcome.ttft > 0 and outcome.level is not None
        assert sum(outcome.gaps) == pytest.approx(outcome.arrivals[-1] - outcome.arrivals[0])


def test_a_sweep_and_its_record(address: str) -> None:
    setting = Setting((Rate(20.0), Rate(40.0)), Objectives(30.0, 30.0), vocabulary=VOCABULARY)
    runs = plan({"burst": fit(TRACE)}, setting.rates)
    seen: list[tuple[int, int]] = []
    server = find(address)
    asyncio.run(sweep(server, runs, setting, lambda place, run, _: seen.append((place, len(run.outcomes)))))
    data = json.loads(json.dumps(record(server, runs, setting)))
    assert seen == [(place, count) for place in (0, 1) for count in range(1, len(TRACE) + 1)]
    assert [run["rate"] for run in data["runs"]] == [20.0, 40.0]
    for run in data["runs"]:
        assert run["summary"]["met"] == run["summary"]["requests"] == len(run["requests"]) == len(TRACE)
        assert run["unsent"] == run["dropped"] == 0
    assert {"date", "command", "versions", "machine", "commit"} <= set(data)
    assert len(matched(data, data)) == 2
    other = data | {"settings": data["settings"] | {"length_scale": 0.5}}
    with pytest.raises(ConfigError, match=r"length_scale is 1.0 in one and 0.5 in the other"):
        matched(data, other)
    with pytest.raises(ConfigError, match="no trace was replayed at the same rate"):
        matched(data, data | {"runs": [data["runs"][0] | {"rate": 7.0}]})


def test_a_run_that_is_stopped_keeps_what_there_is(address: str) -> None:
    setting = Setting((Rate(1.0),), vocabulary=VOCABULARY)
    runs = plan({"slow": fit(TRACE)}, setting.rates)
    server = find(address)

    def stop(place: int, run: Any, open_requests: int) -> None:
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(sweep(server, runs, setting, stop))
    assert time.monotonic() - begun < 3
    (kept,) = record(server, runs, setting)["runs"]
    assert kept["summary"]["requests"] + kept["unsent"] == len(TRACE)
    assert kept["summary"]["done"] >= 1 and kept["unsent"] >= 1


@pytest.mark.parametrize("text", ["fast", "0", "-1", "nan", "infx", ""])
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--rates: expected requests a second"):
        Rate.parse(text)


def test_rates_relative_to_the_trace() -> None:
    workload = fit(TRACE)
    assert Rate.parse("0.5x").of(workload) == pytest.approx(5.0)
    assert Rate.parse(" 3").of(workload) == 3.0
    together = fit([TraceRequest(0.0, 1, 1)] * 3)
    with pytest.raises(ConfigError, match="all come at once"):
        plan({"t": together}, [Rate(1.0)])
    assert plan({"t": fit(TRACE[:1])}, [Rate(1.0)])[0].workload.requests[0].at == 0.0


def test_no_server_and_other_servers_are_named(address: str) -> None:
    with pytest.raises(ConfigError, match=r"no server answers at http://127.0.0.1:9 .* `dsla serve`"):
        find("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no server answers at nonsense"):
        find("nonsense")
    with pytest.raises(ConfigError, match="has the models tiny; --model asks for other"):
        find(address, model="other")
    with pytest.raises(ConfigError, match="refuses a request of token ids up to 99999"):
        asyncio.run(find_server(address, 100_000))


class Peer(BaseHTTPRequestHandler):
    """A server that answers as `answers` says, in turn, and knows no field that OpenAI's first API had not."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "peer"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if {"ignore_eos", "stream_options"} & set(body):
            self._send(400, json.dumps({"error": {"message": "unknown parameter"}}))
            return
        kind = self.answers.pop(0) if self.answers else "whole"
        if kind.isdigit():
            self._send(int(kind), "busy")
            return
        if kind == "hang":
            time.sleep(1.0)
        events = [{"choices": [{"text": "x", "finish_reason": None}]}] * 2
        if kind == "separators":
            events = [{"choices": [{"text": "a\u2028b\x85c\x1c", "finish_reason": None}]}]
        events += {
            "separators": [{"choices": [{"text": "", "finish_reason": "length"}]}],
            "whole": [{"choices": [{"text": "x", "finish_reason": "length"}]}],
            "error": [{"error": {"message": "went wrong"}}],
        }.get(kind, [])
        text = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
        self._send(200, text + ("not: an event\n\ndata: {\n\n" if kind == "garbled" else "data: [DONE]\n\n"))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture(scope="module")
def peer() -> Iterator[Server]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield find(f"http://127.0.0.1:{http.server_port}")
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_server_that_knows_few_fields_is_asked_without_them(peer: Server) -> None:
    assert (peer.extras, peer.max_tokens, peer.model) == ({}, None, "peer")
    (outcome,) = sent(peer, TRACE[:1])
    # Without usage, pieces are all there is to count.
    assert (outcome.status, outcome.output_tokens, outcome.level) == ("done", 3, None)


def test_texts_may_hold_line_separators_of_unicode(peer: Server) -> None:
    Peer.answers[:] = ["separators"]
    (outcome,) = sent(peer, TRACE[:1])
    assert (outcome.status, outcome.error, len(outcome.arrivals)) == ("done", None, 2)


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        ("429", "rejected", "429: busy"),
        ("503", "rejected", "503: busy"),
        ("500", "failed", "500: busy"),
        ("error", "failed", "went wrong"),
        ("cut", "failed", "ended early"),
        ("garbled", "failed", "JSONDecodeError"),
        ("hang", "failed", "no whole answer within 0.5 s"),
    ],
)
def test_answers_that_are_none_are_told_apart(peer: Server, answer: str, status: str, error: str) -> None:
    Peer.answers[:] = [answer]
    (outcome,) = sent(peer, TRACE[:1], timeout=0.5)
    assert outcome.status == status and error in (outcome.error or "")
    assert outcome.record()["status"] == status
