"""The verb `chat`: commands, both sources of answers, piped lines, and a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dsla.cli import talk
from dsla.cli.answers import Answer, Local, Remote, Report, Sampling, Source
from dsla.cli.app import build
from dsla.cli.conversation import COMMANDS, Conversation
from dsla.cli.talk import Terminal, Written
from dsla.distill.data.records import _conversation
from dsla.errors import ConfigError, DslaError, EngineError
from dsla.server.build import EngineSettings, build_engine
from tests.server.site import Site
from tests.server.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("tiny_home")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Site() as site:
        yield site.address


def dsla(*arguments: str, lines: Sequence[str] = ()) -> Result:
    return CliRunner().invoke(build(["chat", "fetch"]), ["chat", *arguments], input="".join(f"{x}\n" for x in lines))


def own(folders: tuple[str, str]) -> tuple[str, ...]:
    return "--model", folders[0], "--adapter", folders[1], "--memory", "8MiB", "--threads", "1", "--max-tokens", "6"


def test_piped_lines_are_turns_and_only_answers_come_out(folders: tuple[str, str]) -> None:
    result = dsla(*own(folders), lines=["fox", "", "/level 3", "dog"])
    assert result.exit_code == 0, result.output
    assert "level" not in result.stdout
    first, level, second = result.stderr.strip().splitlines()
    assert first.startswith("(level 0; 6 tokens, ") and "0 of it from the cache; cut off" in first
    assert level == "Level 3 of 0 ... 3."
    assert second.startswith("(level 0→3; ") and " 0 of it" not in second
    assert result.stdout == dsla(*own(folders), lines=["fox", "/level 3", "dog"]).stdout
    # The second turn is answered with the first in view.
    alone = dsla(*own(folders), "--level", "3", lines=["dog"]).stdout
    assert alone and not result.stdout.endswith(alone)


def test_a_server_answers_as_the_engine_here_does(folders: tuple[str, str], address: str) -> None:
    lines = ["fox 🦆", "/quality full", "/system Be brief.", "dog", "//x"]
    there = dsla("--url", f"{address}/v1/", "--max-tokens", "6", lines=lines)
    assert there.exit_code == 0, there.output
    assert there.stdout == dsla(*own(folders), lines=lines).stdout
    assert "Quality full." in there.stderr
    (report, *_) = [line for line in there.stderr.splitlines() if line.startswith("(level")]
    assert "6 tokens" in report and "first after" in report


def test_quit_ends_before_the_lines_do(address: str) -> None:
    result = dsla("--url", address, lines=["/help", "/quit", "fox"])
    assert result.exit_code == 0 and result.stdout == ""
    assert [name for name in COMMANDS if f"/{name}" not in result.stderr] == []


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        (("--url", NOWHERE), (), "no server answers at http://127.0.0.1:9 .* start one with `dsla serve`"),
        (("--url", "nonsense"), (), "no server answers at nonsense"),
        (("--url", "{address}/admin"), (), "is no server with OpenAI's API"),
        (("--url", "{address}", "--model", "other"), (), "has the models tiny; --model asks for other"),
        (("--url", "{address}", "--level", "4"), (), "level 4 is out of range: this model has levels 0 ... 3"),
        (("--url", "{address}", "--memory", "1GiB"), (), "--memory is about a model in this process"),
        (("--url", "{address}",), ("/nope",), "there is no command /nope"),
        (("--url", "{address}",), ("x" * 9000,), "maximum context length is 4096"),
        (("--model", "./nowhere"), (), "there is no model folder"),
        (("--model", "{model}", "--memory", "lots"), (), "--memory: expected a size"),
        (("--model", "{model}", "--memory", "8MiB", "--level", "1"), (), "level 1 is out of range.* levels 0 ... 0"),
        (("--model", "{model}", "--memory", "8MiB"), ("x" * 9000,), "context of 4096 leaves no room"),
    ],
)  # fmt: skip
def test_it_refuses(
    folders: tuple[str, str], address: str, arguments: tuple[str, ...], lines: tuple[str, ...], message: str
) -> None:
    result = dsla(*(argument.format(address=address, model=folders[0]) for argument in arguments), lines=lines)
    assert isinstance(result.exception, DslaError), result.output
    with pytest.raises(DslaError, match=message):
        raise result.exception


class Guarded(BaseHTTPRequestHandler):
    """A server that wants the key `right`, has no levels, and breaks its stream off where it is asked to."""

    def do_GET(self) -> None:
        good = self.headers["Authorization"] == "Bearer right"
        self._send(200 if good else 401, {"data": [{"id": "m"}]} if good else {"error": {"message": "no such key"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "well"}, "finish_reason": None}]}]
        if asked == "whole":
            chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if asked == "fail":
            chunks.append({"error": {"message": "went wrong"}})
        self._send(200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_keys_come_from_option_or_environment(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSLA_API_KEY", raising=False)
    missing = dsla("--url", guarded).exception
    assert isinstance(missing, ConfigError) and "wants a key: give one with --api-key (no such key)" in str(missing)
    wrong = dsla("--url", guarded, "--api-key", "wrong").exception
    assert isinstance(wrong, ConfigError) and "refuses the key" in str(wrong)
    assert dsla("--url", guarded, "--api-key", "right", lines=["whole"]).stdout == "well\n"
    monkeypatch.setenv("DSLA_API_KEY", "right")
    assert dsla("--url", guarded, lines=["whole"]).stderr.startswith("(")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fail", "the server broke off: went wrong"),
        ("cut", "the server's answer ended early"),
        ("/level 1", "this server has no levels"),
    ],
)
def test_streams_that_break_off_and_servers_without_levels(guarded: str, line: str, message: str) -> None:
    error = dsla("--url", guarded, "--api-key", "right", lines=[line]).exception
    assert isinstance(error, DslaError) and message in str(error)


def test_commands_change_what_is_asked_for() -> None:
    chat = Conversation(8, "first")
    assert chat.command("/level 5") == "Level 5 of 0 ... 8." and chat.levels == {"min_level": 5, "max_level": 5}
    assert chat.command("/level") == "Level 5 of 0 ... 8."
    assert chat.command("/quality balanced") == "Quality balanced." and chat.levels == {"quality": "balanced"}
    assert chat.command("/quality auto") == "Level 0 ... 8, as the engine chooses." and chat.levels == {}
    chat.turns.append({"role": "user", "content": "x"})
    assert chat.messages[0] == {"role": "system", "content": "first"}
    chat.command("/system second one")
    assert [turn["content"] for turn in chat.messages] == ["second one", "x"]
    chat.command("/system")
    assert len(chat.messages) == 1
    chat.command("/clear")
    assert chat.messages == [] and not chat.ended
    chat.command("/quit")
    assert chat.ended


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/level 9", "level 9 is out of range: this model has levels 0 ... 8"),
        ("/level -1", "expected a number in 0 ... 8 or auto, found '-1'"),
        ("/level high", "expected a number"),
        ("/quality best", "expected full, balanced, fast or auto, found 'best'"),
        ("/clear all", "/clear takes nothing after it, found 'all'"),
        ("/", "there is no command /"),
        ("/save", "name a file"),
        ("/save x", "nothing to save in x yet"),
    ],
)
def test_commands_refuse(line: str, message: str) -> None:
    chat = Conversation(8)
    with pytest.raises(ConfigError, match=message):
        chat.command(line)
    assert chat.levels == {}


def test_a_saved_conversation_is_training_data(tmp_path: Path) -> None:
    chat, file = Conversation(0, "Be brief."), tmp_path / "a chat.jsonl"
    chat.turns = [{"role": "user", "content": "fox\u2028🦆"}, {"role": "assistant", "content": "dog"}]
    assert chat.command(f"/save {file}") == f"Wrote 2 messages to {file}."
    (record,) = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert record == {"messages": chat.messages}
    assert "Be brief." in _conversation(record["messages"], "here", tiny_tokenizer())
    chat.command(f"/save {file}")
    (tmp_path / "other").write_text("x")
    for name, message in ((tmp_path / "other", "is there already"), (tmp_path / "no" / "x", "cannot write")):
        with pytest.raises(ConfigError, match=message):
            chat.command(f"/save {name}")


def test_summary_says_what_is_known() -> None:
    report = Report("stop", 1200, 1100, 41, [[0, 0], [900, 12]])
    text = Written("x", report, 0.5, 2.0).summary()
    assert text == "level 0→12; 41 tokens, 20.0 a second, first after 0.50 s; prompt 1,200, 1,100 of it from the cache"
    assert Written("x", Report("length", completion_tokens=1), 0.5).summary().startswith("1 tokens, first after")
    assert Written("x").summary() == "stopped"


class Slow:
    """Answers with more and more words until it is stopped."""

    name, max_level, context = "slow", 4, None

    def __init__(self) -> None:
        self.closed = 0
        self.asked: list[list[dict[str, str]]] = []

    async def answer(self, messages: Sequence[dict[str, str]], levels: Any) -> Answer:
        self.asked.append(list(messages))
        try:
            if messages[-1]["content"] == "fail":
                raise EngineError("no room")
            yield "one \x1b[31m"
            if messages[-1]["content"] != "short":
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
            yield Report("stop")
        finally:
            self.closed += 1

    async def close(self) -> None:
        pass


def typed(monkeypatch: pytest.MonkeyPatch, source: Source, *keys: str | type[BaseException]) -> Conversation:
    """A terminal at which lines are typed and keys pressed."""
    left = list(keys)

    def read(prompt: str) -> str:
        key = left.pop(0)
        if isinstance(key, str):
            return key
        raise key

    conversation = Conversation(source.max_level)
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(talk.sys.stdout, "isatty", lambda: True, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process of its own
    try:
        with asyncio.Runner() as runner:
            Terminal(source, conversation, runner).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left == []
    return conversation


def test_ctrl_c_stops_the_answer_and_the_second_one_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Slow()
    chat = typed(monkeypatch, source, "first", "short", KeyboardInterrupt, "/level 2", "again", KeyboardInterrupt)
    assert [len(asked) for asked in source.asked] == [1, 3, 5]
    assert source.closed == 3
    assert [turn["content"] for turn in chat.turns[:2]] == ["first", "one \x1b[31m"]
    shown = capsys.readouterr().out
    assert shown.count("stopped") == 2 and shown.count("Ctrl-C again leaves") == 1
    assert "Level 2 of 0 ... 4." in shown
    assert "\x1b[31m" not in shown, "what a model writes must not set colours"


def test_ctrl_c_at_the_prompt_twice_and_ctrl_d_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, Slow(), KeyboardInterrupt, KeyboardInterrupt)
    typed(monkeypatch, Slow(), KeyboardInterrupt, "", EOFError)
    typed(monkeypatch, Slow(), "/quit")
    assert capsys.readouterr().out.count("slow, levels 0 ... 4. /help lists commands") == 3


def test_a_turn_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat = typed(monkeypatch, Slow(), "fail", "/nope", "short", EOFError)
    assert [turn["content"] for turn in chat.turns][::2] == ["short"]
    shown = capsys.readouterr().out
    assert "error: no room" in shown and "error: there is no command /nope" in shown


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_stopped_answer_frees_its_request(where: str, folders: tuple[str, str], address: str) -> None:
    sampling, message = Sampling(max_tokens=3000, temperature=1.0, seed=1), [{"role": "user", "content": "fox"}]

    async def talked() -> None:
        service = None
        if where == "here":
            settings = EngineSettings(folders[0], folders[1], memory_bytes=8 << 20, threads=1)
            service = build_engine(settings)
            source: Source = Local(service, sampling)
        else:
            source = await Remote.connect(address, None, None, sampling)
        answer = source.answer(message, {"quality": "fast"})
        async for part in answer:
            if part:
                break
        await answer.aclose()
        await _until(lambda: service is None or service.engine.stats()["running"] == 0)
        # Nothing of the first is in the way of the second.
        short = [part async for part in type(source).answer(source, message, {}) if isinstance(part, Report)]
        assert short[0].completion_tokens
        await source.close()

    asyncio.run(asyncio.wait_for(talked(), 60))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
