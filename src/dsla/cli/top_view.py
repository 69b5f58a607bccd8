"""What `dsla top` shows of a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dsla.cli import loads
from dsla.cli.sizes import format_bytes

_BARS = "▁▂▃▄▅▆▇█"
_MEMORY_BAR, _NAME = 30, 9
_REMEMBERED = 1000
_HEAD_LINES, _TABLE_LINES = 7, 3
_ID = 12
_QUIET_EVENTS = ("accept",)


@dataclass
class Watched:
    """A server as it has been seen so far.

    Attributes:
        root: its address.
        model: its model.
        stats: of the last time it answered; its events are all that have been seen, the latest of them.
        levels: mean level of its running requests at each look, the latest last.
        lost: why it does not answer now, or None.
    """

    root: str
    model: str
    stats: loads.Stats
    levels: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    lost: str | None = None

    @property
    def event_count(self) -> int:
        """How many events need not be told again: none to whoever answers after a failure, who may be another server."""
        return 0 if self.lost is not None else int(self.stats.get("event_count", 0))

    def see(self, model: str, stats: loads.Stats) -> None:
        """Takes what the server says now: all its events, or those after `event_count`."""
        known = self.stats["events"] if 0 < self.event_count <= stats["event_count"] else []
        self.model, self.stats, self.lost = model, stats | {"events": [*known, *stats["events"]][-_REMEMBERED:]}, None
        self.levels.append(loads.mean_level(stats))


def picture(watched: Watched, width: int, height: int | None = None) -> RenderableType:
    """All of it.

    Args:
        watched: the server.
        width: columns there are.
        height: lines there are; None = as many as it takes.
    """
    room = None if height is None else max(height - _HEAD_LINES - 2 * _TABLE_LINES, 2)
    stats = watched.stats
    events = [event for event in reversed(stats["events"]) if event["kind"] not in _QUIET_EVENTS]
    shown = len(stats["requests"]) if room is None else min(len(stats["requests"]), max(room // 2, room - len(events)))
    parts: list[RenderableType] = [_title(watched), *_head(watched, width)]
    parts += [Text(), _requests(stats["requests"], shown, stats["running"] + stats["waiting"])]
    parts += [Text(), _events(events[: 20 if room is None else max(room - shown, 1)], stats["now"])]
    return Group(*parts)


def sparkline(values: Iterable[float], top: float) -> str:
    """Values from 0 to `top` as a row of bars."""
    steps = len(_BARS) - 1
    return "".join(_BARS[round(min(max(value / top, 0.0), 1.0) * steps) if top else 0] for value in values)


def age(seconds: float) -> str:
    """A time that has passed, as `12 s`, `3 min` or `2 h`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _title(watched: Watched) -> Text:
    title = Text(f"{watched.model} at {watched.root}", "bold", no_wrap=True, overflow="ellipsis")
    if watched.lost is not None:
        title = Text(f"No answer, trying again: {watched.lost}", "bold red")
        title.no_wrap, title.overflow = True, "ellipsis"
    return title


def _head(watched: Watched, width: int) -> list[RenderableType]:
    stats = watched.stats
    kept, parked = stats["cached_bytes"], stats["parked_bytes"]
    parts = Text().append(f"KV caches {format_bytes(stats['kv_bytes'])}", "blue").append(" + ")
    parts.append(f"states {format_bytes(stats['state_bytes'])}", "red")
    parts.append(f"; {format_bytes(kept)} kept for reuse" if kept else "")
    parts.append(f"; {format_bytes(parked)} parked" if parked else "")
    history = sparkline(list(watched.levels)[-max(width // 2 - _NAME, 10) :], stats["max_level"])
    level = Text().append(f"{history} " if len(watched.levels) > 1 else "", "green").append(loads.level(stats))
    level.append(f"; new requests may start at {stats['new_level']}" if stats["level"] is None else "")
    return [
        _row("Requests", Text(f"{loads.requests(stats)}; {loads.speed(stats)}")),
        _row("Memory", _memory_bar(stats)),
        _row("", parts),
        _row("Level", level),
        _row("Latency", Text(_latencies(stats))),
    ]


def _row(name: str, text: Text) -> Text:
    row = Text(f"{name:<{_NAME}}", no_wrap=True, overflow="ellipsis")
    return row.append_text(text)


def _memory_bar(stats: loads.Stats) -> Text:
    budget = max(stats["budget_bytes"], 1)
    ends = (stats["kv_bytes"], loads.used_bytes(stats), loads.used_bytes(stats) + stats["cached_bytes"])
    kv, used, kept = (round(_MEMORY_BAR * size / budget) for size in ends)
    bar = Text().append("█" * kv, "blue").append("█" * (used - kv), "red").append("▒" * (kept - used), "dim")
    return bar.append("░" * (_MEMORY_BAR - kept), "dim").append(f" {loads.memory(stats)}")


def _latencies(stats: loads.Stats) -> str:
    parts = []
    for name, key in (("TTFT", "ttft_seconds"), ("ITL", "itl_seconds")):
        found = stats.get(key)
        values = ", ".join(f"{percentile} {value:.2f}" for percentile, value in found.items()) if found else "none"
        parts.append(f"{name} {values}")
    return "; ".join(parts) + " (seconds, of late)"


def _requests(requests: Sequence[dict[str, Any]], shown: int, open_requests: int) -> RenderableType:
    if not requests:
        return Text("No requests.", "dim")
    table = _table("Request", "State", "Levels", "Read", "Written", "Cached", "Age")
    for request in requests[:shown]:
        prompt, computed = request["prompt_tokens"], request["computed_tokens"]
        table.add_row(
            escape(request["id"][:_ID]),
            request["status"],
            "→".join(str(level) for _, level in request["levels"]),
            f"{prompt:,}" if computed >= prompt else f"{computed:,} of {prompt:,}",
            f"{request['completion_tokens']:,}",
            f"{request['cached_tokens']:,}",
            age(request["age_seconds"]),
        )
    rest = open_requests - shown
    return Group(table, Text(f"and {rest} more", "dim")) if rest else table


def _events(events: Sequence[dict[str, Any]], now: float) -> RenderableType:
    if not events:
        return Text("No events.", "dim")
    table = _table("Ago", "Event", "Request", "Level", "Reason")
    for event in events:
        before, after, freed = event["from_level"], event["to_level"], event["freed_bytes"]
        level = "" if after is None else f"{after}" if before is None else f"{before}→{after}"
        reason = event["reason"] + (f", {format_bytes(freed)} freed" if freed > 0 else "")
        table.add_row(
            age(now - event["time"]), event["kind"], escape((event["request_id"] or "")[:_ID]), level, escape(reason)
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name in ("Read", "Written", "Cached") else "left")
    return table
