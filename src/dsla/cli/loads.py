"""What an engine's stats say, in words; for every view of a server."""

from __future__ import annotations

from typing import Any

from dsla.cli.sizes import format_bytes

Stats = dict[str, Any]
"""As `Engine.stats` gives them, and `/admin/state` passes them on."""


def mean_level(stats: Stats) -> float:
    """Mean level of the running requests; where there is none, the level that a new one may start at."""
    levels = [request["level"] for request in stats["requests"] if request["status"] == "running"]
    return sum(levels) / len(levels) if levels else float(stats["new_level"])


def requests(stats: Stats) -> str:
    """How many requests there are."""
    return f"{stats['running']} running, {stats['waiting']} waiting"


def level(stats: Stats) -> str:
    """The level now, and who sets it."""
    top, fixed = stats["max_level"], stats["level"]
    return f"fixed at {fixed} of {top}" if fixed is not None else f"{mean_level(stats):.1f} of {top}"


def speed(stats: Stats) -> str:
    """Tokens a second of late."""
    read, written = stats["prompt_tokens_per_second"], stats["generated_tokens_per_second"]
    return f"{read:,.0f} tokens/s read, {written:,.1f} written"


def used_bytes(stats: Stats) -> int:
    """Memory that running requests take."""
    return int(stats["kv_bytes"] + stats["state_bytes"])


def memory(stats: Stats) -> str:
    """Memory that running requests take, of the budget."""
    return f"{format_bytes(used_bytes(stats))} of {format_bytes(stats['budget_bytes'])}"
