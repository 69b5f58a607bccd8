"""How a chat is held: on a terminal, or with lines that are piped in."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass

import typer
from rich.console import Console

from dsla.cli.answers import Report, Source
from dsla.cli.conversation import Conversation
from dsla.errors import DslaError

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@dataclass
class Written:
    """An answer as far as it has come.

    Attributes:
        text: its text.
        report: what whoever answered says of it; None before its end.
        first_seconds: time to its first text.
        seconds: time from its first text to its last.
    """

    text: str = ""
    report: Report | None = None
    first_seconds: float = 0.0
    seconds: float = 0.0

    def summary(self) -> str:
        """Levels, speed, and what was computed before, in a line."""
        if self.report is None:
            return "stopped"
        report, parts = self.report, []
        if report.levels:
            parts.append(f"level {'→'.join(str(level) for _, level in report.levels)}")
        if report.completion_tokens is not None:
            speed = (report.completion_tokens - 1) / self.seconds if self.seconds else 0
            rate = f", {speed:,.1f} a second" if speed > 0 else ""
            parts.append(f"{report.completion_tokens:,} tokens{rate}, first after {self.first_seconds:.2f} s")
        if report.prompt_tokens is not None:
            cached = "" if report.cached_tokens is None else f", {report.cached_tokens:,} of it from the cache"
            parts.append(f"prompt {report.prompt_tokens:,}{cached}")
        if report.finish_reason == "length":
            parts.append("cut off by the limit of tokens")
        return "; ".join(parts)


class Talk:
    """A conversation with whoever answers.

    Args:
        source: whoever answers.
        conversation: what has been said and is asked for.
        runner: runs coroutines; a Ctrl-C cancels the one that runs, and comes out as `KeyboardInterrupt`.
    """

    def __init__(self, source: Source, conversation: Conversation, runner: asyncio.Runner) -> None:
        self._source, self._conversation, self._runner = source, conversation, runner

    def ask(self, text: str) -> Written:
        """Gets the answer to a turn of the user and shows it as it comes.

        Turn and answer are kept, also where a Ctrl-C ends the answer after some text.

        Raises:
            DslaError: there is no answer; the turn is not kept.
        """
        conversation, written = self._conversation, Written()
        turn = {"role": "user", "content": text}
        with contextlib.suppress(KeyboardInterrupt):
            self._runner.run(self._receive(turn, written))
        if written.text or written.report is not None:
            conversation.turns += [turn, {"role": "assistant", "content": written.text}]
        return written

    def show(self, part: str) -> None:
        """Prints a piece of an answer."""
        # What a model writes must not move a terminal's cursor or set its colours.
        typer.echo(part.translate(_CONTROL) if sys.stdout.isatty() else part, nl=False)

    async def _receive(self, turn: dict[str, str], written: Written) -> None:
        conversation, begun = self._conversation, time.perf_counter()
        messages = [*conversation.messages, turn]
        async with aclosing(self._source.answer(messages, conversation.levels)) as answer:
            async for part in answer:
                if isinstance(part, Report):
                    written.report = part
                elif part:
                    now = time.perf_counter() - begun
                    written.first_seconds = written.first_seconds or now
                    written.seconds = now - written.first_seconds
                    written.text += part
                    self.show(part)


class Pipe(Talk):
    """Lines from stdin, answers and nothing else on stdout; what is known of them goes to stderr."""

    def run(self) -> None:
        """Talks until the lines end.

        Raises:
            DslaError: a command is wrong, or there is no answer.
        """
        for line in sys.stdin:
            line = line.strip()
            if _is_command(line):
                typer.echo(self._conversation.command(line), err=True)
            elif line:
                written = self.ask(_unescaped(line))
                typer.echo()
                typer.echo(f"({written.summary()})", err=True)
                if written.report is None:
                    raise typer.Exit(130)
            if self._conversation.ended:
                return


class Terminal(Talk):
    """A prompt for each turn. A Ctrl-C stops the answer, or else the second one in a row leaves, as Ctrl-D does."""

    def run(self) -> None:
        """Talks until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` editing and the lines before)
        source, self._console = self._source, Console(highlight=False)
        levels = f", levels 0 ... {source.max_level}" if source.max_level is not None else ""
        context = f", context {source.context:,} tokens" if source.context is not None else ""
        self._say(f"{source.name}{levels}{context}. /help lists commands, Ctrl-D leaves.")
        interrupted = False
        while not self._conversation.ended:
            try:
                interrupted = self._take(input("> ").strip())
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                typer.echo()
                if interrupted:
                    return
                interrupted = True
                self._say("Ctrl-C again leaves, as Ctrl-D does.")

    def _take(self, line: str) -> bool:
        """Does what a line asks; whether a Ctrl-C stopped it."""
        try:
            if _is_command(line):
                self._say(self._conversation.command(line))
            elif line:
                written = self.ask(_unescaped(line))
                typer.echo()
                self._say(written.summary())
                return written.report is None
        except DslaError as error:
            self._console.print(f"error: {error}", style="red", markup=False)
        return False

    def _say(self, text: str) -> None:
        if text:
            self._console.print(text, style="dim", markup=False)


def _is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def _unescaped(line: str) -> str:
    """A line that begins with `//` stands for one with `/`."""
    return line.removeprefix("/") if line.startswith("//") else line
