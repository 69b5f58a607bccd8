"""What `dsla demo` shows: what it is about to do, the streams while they run, and what happened."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dsla.bench.demo import Demo, Sample, StreamResult
from dsla.bench.streams import Need
from dsla.cli.sizes import format_bytes

_LINE_SECONDS = 10.0
_BAR = 30
_RECENT_STEPS = 8


class View:
    """The terminal. On one that can be redrawn, a live table; elsewhere a line now and then; a line per conversion on both.

    Args:
        run: the demo; not started yet.
        need: memory of its streams.
        console: where to print. Default: stdout.
    """

    def __init__(self, run: Demo, need: Need, console: Console | None = None) -> None:
        self._run, self._need = run, need
        self._console = console or Console(highlight=False)
        self._budget = run.engine.arena.budget_bytes
        self._top = len(run.engine.decoder.order)
        self._levels = (0,) * len(run.streams)
        self._freed = 0
        self._last_line = 0.0
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def open(self) -> None:
        """Says what is going to happen."""
        streams, engine = self._run.streams, self._run.engine
        lengths = [len(stream.prompt) for stream in streams]
        slot = engine.arena.slot_units * engine.arena.page_bytes
        per_token = engine.decoder.kv_spec.bytes_per_token
        fits = "holds" if self._need.at_level_0 <= self._budget else "does not hold"
        self._say(
            f"{_count(len(streams), 'stream')}: each reads the opening of a book ({min(lengths):,} to {max(lengths):,} tokens) "
            f"and writes {streams[0].max_tokens} more, all at the same time."
        )
        self._say(
            f"With full attention in every layer (level 0) their KV caches need {format_bytes(self._need.at_level_0)}. "
            f"The budget of {format_bytes(self._budget)} {fits} that."
        )
        self._say(
            f"When memory gets short, layers of running streams are converted, up to level {self._top} of "
            f"{engine.decoder.n_layers} layers: the KV cache of a converted layer, {per_token:,} bytes a token, is folded into "
            f"states of {format_bytes(slot)} that do not grow."
        )
        self._say("")

    def show(self, sample: Sample) -> None:
        """Shows the load after a step."""
        if sample.levels != self._levels:
            self._say(self._conversions(sample))
        elif not self._console.is_terminal and sample.seconds - self._last_line >= _LINE_SECONDS:
            self._last_line = sample.seconds
            self._say(f"{sample.seconds:6.1f} s  {self._progress(sample)}")
        self._levels, self._freed = sample.levels, sample.freed_bytes
        if self._console.is_terminal:
            self._live.update(self._picture(sample), refresh=True)

    def close(self, out: Path) -> None:
        """Says what happened.

        Args:
            out: folder with the files.
        """
        results = self._run.results()
        self._say("")
        self._console.print(self._results(results))
        self._say("\nWhat they wrote:")
        for result in results:
            text = Text(f"  {result.title}: … {' '.join(result.text.split())}")
            self._console.print(text, no_wrap=True, overflow="ellipsis")
        for line in self._sentences(results):
            self._say(line)
        self._say(f"Picture: {out / 'demo.png'}   All figures: {out / 'demo.json'}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def _conversions(self, sample: Sample) -> str:
        titles = [stream.title for stream in self._run.streams]
        rises = [
            f"{title} {before}→{after}"
            for title, before, after in zip(titles, self._levels, sample.levels, strict=True)
            if before != after
        ]
        layers = sum(sample.levels) - sum(self._levels)
        return (
            f"{sample.seconds:6.1f} s  memory short: {_count(layers, 'layer')} converted, "
            f"{format_bytes(sample.freed_bytes - self._freed)} freed. Levels: {', '.join(rises)}"
        )

    def _progress(self, sample: Sample) -> str:
        read = sum(min(done, len(s.prompt)) for done, s in zip(sample.computed, self._run.streams, strict=True))
        total = sum(len(stream.prompt) for stream in self._run.streams)
        written = sum(s.generated_tokens for s in self._run.samples)
        return (
            f"{read:,} of {total:,} tokens read, {written:,} written; {format_bytes(sample.used_bytes)} of "
            f"{format_bytes(self._budget)} in use (level 0: {format_bytes(sample.level_0_bytes)}); "
            f"mean level {sample.mean_level:.1f}"
        )

    def _picture(self, sample: Sample) -> RenderableType:
        recent = self._run.samples[-_RECENT_STEPS:]
        seconds = sum(step.step_seconds for step in recent)
        read = sum(step.prompt_tokens for step in recent) / seconds if seconds else 0.0
        written = sum(step.generated_tokens for step in recent) / seconds if seconds else 0.0
        kv, states = (
            round(_BAR * size / self._budget) for size in (sample.kv_bytes, sample.kv_bytes + sample.state_bytes)
        )
        memory = Text("Memory  ")
        memory.append("█" * kv, "blue").append("█" * (states - kv), "red").append("░" * (_BAR - states), "dim")
        memory.append(f" {format_bytes(sample.used_bytes)} of {format_bytes(self._budget)}")
        parts = Text("        ").append(f"KV caches {format_bytes(sample.kv_bytes)}", "blue").append(" + ")
        parts.append(f"states {format_bytes(sample.state_bytes)}", "red")
        parts.append(f"; at level 0: {format_bytes(sample.level_0_bytes)}")
        lines = (
            parts,
            Text(f"Levels  mean {sample.mean_level:.1f}, highest {sample.max_level} of {self._top}"),
            Text(f"Speed   {read:,.0f} tokens/s read, {written:,.1f} tokens/s written; {sample.seconds:.0f} s"),
            Text(),
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("Book", "Doing", "Level"):
            table.add_column(name, no_wrap=True)
        for index, stream in enumerate(self._run.streams):
            level = Text(f"{sample.levels[index]:>2} ").append("■" * sample.levels[index], "green")
            level.append("·" * (self._top - sample.levels[index]), "dim")
            table.add_row(stream.title, self._doing(index, sample), level)
        return Group(memory, *lines, table)

    def _doing(self, index: int, sample: Sample) -> str:
        stream, done = self._run.streams[index], sample.computed[index]
        prompt = len(stream.prompt)
        if done >= stream.final_tokens:
            return "finished"
        if done >= prompt:
            return f"writing {done - prompt + 1:,} of {stream.max_tokens:,}"
        return f"reading {done:,} of {prompt:,}" if done else "waiting to read"

    def _results(self, results: list[StreamResult]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("Book", no_wrap=True)
        for name in ("Read", "Wrote"):
            table.add_column(name, justify="right")
        table.add_column("Levels, one after the other")
        table.add_column("End", no_wrap=True)
        for result in results:
            table.add_row(
                result.title,
                f"{result.prompt_tokens:,}",
                f"{result.generated_tokens:,}",
                "→".join(str(level) for _, level in result.levels),
                "finished" if result.finished else result.finish_reason,
            )
        return table

    def _sentences(self, results: list[StreamResult]) -> list[str]:
        samples, last = self._run.samples, self._run.samples[-1]
        lines = [""]
        failed = [
            f"{result.title} ({result.error or result.finish_reason})" for result in results if not result.finished
        ]
        read, written = sum(s.prompt_tokens for s in samples), sum(s.generated_tokens for s in samples)
        done = f"{read:,} tokens read and {written:,} written in {last.seconds:.0f} s."
        if failed:
            lines.append(f"{len(failed)} of {len(results)} streams did not finish: {'; '.join(failed)}. {done}")
        else:
            lines.append(f"All {_count(len(results), 'stream')} finished: {done}")
        peak, level_0 = max(s.used_bytes for s in samples), max(s.level_0_bytes for s in samples)
        lines.append(
            f"Memory: at most {format_bytes(peak)} of the budget of {format_bytes(self._budget)} was in use; at level 0 the "
            f"same requests would have taken {format_bytes(level_0)}."
        )
        if last.conversions:
            low, high = min(last.levels), max(last.levels)
            lines.append(
                f"Conversions: {last.conversions:,}, each one layer of one stream while all went on; "
                f"{format_bytes(last.freed_bytes)} freed, nothing computed again. Levels ended at {low} to {high} of "
                f"{self._top}, {last.mean_level:.1f} on average."
            )
        else:
            lines.append(
                "Conversions: none, since the budget held everything at level 0. Give less --memory to see some."
            )
        waited = max(s.waiting for s in samples)
        if waited:
            lines.append(
                f"Up to {_count(waited, 'stream')} had to wait: even converted, the budget did not hold all at once."
            )
        return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
