"""The line in which `dsla serve` says how it is, while its terminal is watched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dsla.cli import loads

if TYPE_CHECKING:
    from dsla.engine import AsyncEngine

_A_SECOND = 1.0


@contextmanager
def status_line(engine: AsyncEngine, console: Console | None = None) -> Iterator[None]:
    """Shows requests, level, speed and memory in the last line of a terminal, anew each second; elsewhere nothing.

    What is printed meanwhile stands above it. A log that goes to stderr must be opened inside, or it runs into the line.

    Args:
        engine: the engine.
        console: where to show it. Default: stdout.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield
        return
    with Live(
        console=console,
        get_renderable=lambda: line(engine.stats(events_after=None, most_waiting=0)),
        refresh_per_second=_A_SECOND,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),
    ):
        yield


def line(stats: loads.Stats) -> Text:
    """The line."""
    parts = (loads.requests(stats), f"level {loads.level(stats)}", loads.speed(stats), loads.memory(stats))
    return Text("  ".join(parts), "dim", no_wrap=True, overflow="ellipsis")
