"""The verb `top`: what it shows of a server, and of one that goes away."""

from __future__ import annotations

import copy
import json
import os
import pty
import termios
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from dsla.cli import keys as keys_module
from dsla.cli import top as top_module
from dsla.cli.app import build
from dsla.cli.top import look, too_small
from dsla.cli.top_view import Watched, age, picture, sparkline
from dsla.engine import SamplingParams
from dsla.errors import ConfigError
from tests.server.site import Site
from tests.server.tiny import tiny_engine

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Site() as site:
        yield site.address


@pytest.fixture(scope="module")
def stats() -> dict[str, Any]:
    """Of an engine with one request that has been raised to level 2, and ten that have just come."""
    engine = tiny_engine()
    engine.add_request(
        list(range(3, 40)), SamplingParams(max_tokens=9, ignore_eos=True), request_id="first-request-of-all"
    )
    for _ in range(3):
        engine.step()
    engine.set_level(2)
    engine.step()
    for i in range(10):
        engine.add_request([3, 4, 5], SamplingParams(max_tokens=4), request_id=f"[{i}]")
    return engine.stats()


def dsla(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(build(["top", "fetch"]), ["top", *arguments], env={"COLUMNS": "100", **environment})


def shown(watched: Watched, width: int = 100, height: int | None = None) -> str:
    console = Console(width=width, height=height or 200, file=StringIO(), record=True)
    console.print(picture(watched, width, height))
    return console.export_text()


def watched(stats: dict[str, Any]) -> Watched:
    found = Watched("http://here", "", {})
    found.see("tiny", copy.deepcopy(stats))
    return found


def test_once_shows_a_server_that_runs(address: str) -> None:
    body = {"model": "tiny", "prompt": "fox", "max_tokens": 3, "ignore_eos": True, "dsla": {"min_level": 2}}
    httpx.post(f"{address}/v1/completions", json=body).raise_for_status()
    result = dsla(f"{address}/v1", "--once")
    assert result.exit_code == 0, result.output
    for text in (f"tiny at {address}", "0 running, 0 waiting", "of 8.0 MiB", "No requests.", "finish", "length"):
        assert text in result.stdout
    assert "TTFT p50" in result.stdout and "ITL p50" in result.stdout


def test_picture_says_what_the_engine_says(stats: dict[str, Any]) -> None:
    text = shown(watched(stats))
    assert "1 running, 10 waiting" in text
    assert "fixed at 2 of 3" in text
    (row,) = [line for line in text.splitlines() if line.startswith("first-reques ") and "running" in line]
    assert row.split()[1:3] == ["running", "0→2"]
    assert [line.split()[0] for line in text.splitlines() if "waiting" in line and "[" in line][:2] == ["[0]", "[1]"]
    (change,) = [line for line in text.splitlines() if " level " in line and "0→2" in line]
    assert "first-reques" in change and stats["events"][-11]["reason"] in change
    assert "queued" not in text


def test_picture_without_latencies(stats: dict[str, Any]) -> None:
    """A server of another version may not have them."""
    other = {key: value for key, value in stats.items() if not key.endswith("itl_seconds")}
    assert "ITL none" in shown(watched(other | {"ttft_seconds": {"p50": 0.5}}))
    assert "TTFT p50 0.50; ITL none (seconds, of late)" in shown(watched(other | {"ttft_seconds": {"p50": 0.5}}))


@pytest.mark.parametrize(("width", "height"), [(60, 16), (80, 24), (200, 60)])
def test_picture_keeps_to_the_terminal(stats: dict[str, Any], width: int, height: int) -> None:
    found = watched(stats)
    found.levels.extend([3.0] * 500)
    found.stats["events"] *= 40
    found.stats["requests"] *= 40
    found.stats |= {"running": 40, "waiting": 400}
    lines = shown(found, width, height).rstrip("\n").splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any(line.startswith("and ") and line.endswith(" more") for line in lines)
    assert sum("level" in line or "start" in line for line in lines) >= 2


def test_events_are_kept_from_look_to_look(stats: dict[str, Any]) -> None:
    first, second = (stats | {"events": [event], "event_count": n} for n, event in enumerate(stats["events"][:2], 1))
    found = watched(first)
    assert found.event_count == 1
    found.see("tiny", second)
    assert (found.event_count, found.stats["events"]) == (2, stats["events"][:2])
    found.see("tiny", first)  # of another server: it has counted fewer, and tells all
    assert (found.event_count, found.stats["events"]) == (1, stats["events"][:1])
    found.lost = "gone"
    assert found.event_count == 0
    found.see("tiny", second)
    assert found.stats["events"] == stats["events"][1:2]


def test_requests_that_the_server_does_not_list_are_counted(stats: dict[str, Any]) -> None:
    found = watched(stats | {"requests": stats["requests"][:3]})
    assert "and 8 more" in shown(found)


def test_levels_over_time(stats: dict[str, Any]) -> None:
    assert sparkline([0, 1, 2, 3, 9, -1], 3) == "▁▃▆██▁"
    assert sparkline([0, 0], 0) == "▁▁"
    found = watched(stats)
    assert "▁" not in shown(found) and "█ fixed" not in shown(found)
    found.levels.clear()
    found.levels.extend([0.0, 1.5, 3.0])
    assert "▁▅█ fixed at 2 of 3" in shown(found)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h")]
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


class Fickle(BaseHTTPRequestHandler):
    """A server that answers in turn what it is told to: a status, or stats."""

    answers: ClassVar[list[int | dict[str, Any]]] = []
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        answer = self.answers.pop(0)
        body: dict[str, Any] = (
            {"error": {"message": "so it is"}} if isinstance(answer, int) else {"model": "m", "stats": answer}
        )
        data = json.dumps(body).encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fickle() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fickle)
    Thread(target=server.serve_forever, daemon=True).start()
    Fickle.answers, Fickle.keys = [], []
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "wants a key: give one with --api-key (so it is)"),
        (403, "does not let us in: so it is"),
        (404, "is no server of `dsla serve` (its /admin/state answers 404): fix the URL"),
        (503, "answers 503: so it is"),
    ],
)
def test_servers_that_refuse(fickle: str, status: int, message: str) -> None:
    Fickle.answers = [status]
    error = dsla(fickle, "--once").exception
    assert isinstance(error, ConfigError) and message in str(error)


def test_the_key_comes_from_option_or_environment(fickle: str, stats: dict[str, Any]) -> None:
    Fickle.answers = [401, stats, stats, stats]
    error = dsla(fickle, "--once", "--api-key", "wrong").exception
    assert isinstance(error, ConfigError) and "refuses the key" in str(error)
    assert dsla(fickle, "--once", "--api-key", "a").exit_code == 0
    assert dsla(fickle, "--once", DSLA_API_KEY="b").exit_code == 0
    assert dsla(fickle, "--once", DSLA_API_KEY="b", DSLA_ADMIN_KEY="c").exit_code == 0
    assert Fickle.keys == ["Bearer wrong", "Bearer a", "Bearer b", "Bearer c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NOWHERE, "--once"), "no server answers at http://127.0.0.1:9 "),
        (("nonsense", "--once"), "no server answers at nonsense"),
        ((NOWHERE,), "the live view needs a terminal, and stdout is none: use --once"),
    ],
)
def test_it_refuses(arguments: tuple[str, ...], message: str) -> None:
    error = dsla(*arguments).exception
    assert isinstance(error, ConfigError) and message in str(error)


def terminal(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> Console:
    """A terminal of some size that stands in for stdout."""
    console = Console(
        width=width, height=height, file=StringIO(), force_terminal=True, highlight=False, legacy_windows=False
    )
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    return console


def test_a_terminal_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert too_small(Console(width=60, height=16)) is None
    terminal(monkeypatch, 40, 30)
    error = dsla(NOWHERE).exception
    assert isinstance(error, ConfigError)
    assert "the terminal has 40 columns and 30 lines, and the view needs 60 and 16: enlarge it" in str(error)


def test_a_server_that_goes_away_and_returns_is_shown(
    fickle: str, stats: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Fickle.answers = [stats, 503, stats]
    console = terminal(monkeypatch, 100, 30)
    views: list[str] = []

    def wait(self: object, seconds: float) -> str | None:
        assert isinstance(console.file, StringIO)
        views.append(console.file.getvalue())
        console.file.truncate(console.file.seek(0))
        return "q" if len(views) == 3 else None

    monkeypatch.setattr(keys_module.Keys, "wait", wait)
    result = dsla(fickle)
    assert result.exit_code == 0, result.output
    there, away, back = views
    assert "m at http" in there and "No answer" not in there
    assert "No answer, trying again: the server at" in away and "answers 503" in away and "1 running" in away
    assert "m at http" in back and "No answer" not in back
    assert Fickle.answers == []


def test_a_server_that_dies_is_told_apart_from_one_that_errs(fickle: str, stats: dict[str, Any]) -> None:
    Fickle.answers = [stats]
    seen = Watched(fickle, "", {})
    with httpx.Client(base_url=fickle) as client:
        look(client, seen)
    with httpx.Client(base_url=NOWHERE) as client, pytest.raises(ConfigError, match="no server answers"):
        look(client, seen)
    assert seen.model == "m" and seen.lost is None


def test_keys_of_a_terminal_need_no_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stdin, os.fdopen(ours, "wb", buffering=0) as keyboard:
        monkeypatch.setattr("sys.stdin", stdin)
        before = termios.tcgetattr(stdin)
        with keys_module.Keys() as keys:
            assert keys.wait(0.0) is None
            keyboard.write(b"xq")
            assert (keys.wait(5.0), keys.wait(5.0)) == ("x", "q")
        assert termios.tcgetattr(stdin) == before


def test_keys_without_a_terminal_are_none() -> None:
    begun = time.monotonic()
    with keys_module.Keys() as keys:
        assert keys.wait(0.02) is None
    assert time.monotonic() - begun >= 0.02
    assert top_module.too_small(Console(width=59, height=99)) is not None
