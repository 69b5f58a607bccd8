"""Writes the tables of the engine's measurements in `docs/benchmarks.md` from the committed results.

python benchmarks/engine_tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import INSTRUCTIONS, RESULTS
from tables import fill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
_OURS = "dsla, level {}, {}"
_SWEEP = 3  # rates, at least
_HTTP_WORK = (32, 256, 128)
_HEAD_DIM, _KV_HEADS, _LAYERS, _BF16 = 64, 3, 30, 2

Bar = tuple[str, str, Callable[[dict[str, Any]], float], float | None, bool]
"""Work, what it is held against, the figure from the results by file, the bar if there is one, and whether more is better."""


def _peer(work: str, ours: str, peer: str) -> Callable[[dict[str, Any]], float]:
    """How many times as fast as a peer's best setting, of those whose names begin with `peer`: the median over turns."""

    def ratio(results: dict[str, Any]) -> float:
        seconds = results["peers"]["seconds"]
        settings = [by[work] for name, by in seconds.items() if name.startswith(peer) and work in by]
        own = seconds[ours][work]
        return min(statistics.median(t / o for t, o in zip(theirs, own, strict=True)) for theirs in settings)

    return ratio


def _attention_share(results: dict[str, Any]) -> float:
    """Bytes of keys and values read a second by attention, over the bandwidth measured between the rounds."""
    peers = results["peers"]
    read = 8 * 7936 * _LAYERS * 2 * _KV_HEADS * _HEAD_DIM * _BF16
    return read / peers["medians"][_OURS.format(0, "bf16")]["attention 8 x 7936"] / max(peers["read_bandwidth"])


def _engine(*path: str) -> Callable[[dict[str, Any]], float]:
    def figure(results: dict[str, Any]) -> float:
        found = results["engine"]
        for key in path:
            found = found[key]
        return float(found)

    return figure


def _goodput(trace: str, multiple: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: float(results["serving"]["traces"][trace]["rates"][multiple]["goodput_ratio"])


def _least_goodput(trace: str) -> Callable[[dict[str, Any]], float]:
    """The ratio at the rate where it is least, of a sweep over several."""

    def least(results: dict[str, Any]) -> float:
        rows = results["serving"]["traces"][trace]["rates"].values()
        if len(rows) < _SWEEP:
            raise KeyError(trace)
        return min(float(row["goodput_ratio"]) for row in rows)

    return least


def _lost(results: dict[str, Any]) -> float:
    """Accepted requests without a complete answer, of all replays against the adaptive server."""
    traces = results["serving"]["traces"].values()
    rows = [row["adaptive"] for trace in traces for row in trace["rates"].values()]
    return float(sum(row["failed"] + row["cancelled"] + row["short"] for row in rows))


def _http(results: dict[str, Any]) -> float:
    """Of the engine's throughput what arrives through HTTP; of a run with the work that the bar is for."""
    found = results["http"]
    if (found["requests"], found["prompt_tokens"], found["output_tokens"]) != _HTTP_WORK:
        raise KeyError("http")
    return float(found["ratio"])


def _longest_step(results: dict[str, Any]) -> float:
    found = results["engine"]["conversion"]
    return float(max(found["longest_step_seconds"]) / found["step_bound_seconds"])


_LLAMA = "llama.cpp"
_DYNAMIC, _STATIC = "transformers, dynamic cache, bf16", "transformers, static cache, bf16"

BARS: tuple[Bar, ...] = (
    ("decode, 8 x 7,936 tokens, bf16, level 0", "transformers, dynamic cache",
     _peer("decode 8 x 7936", _OURS.format(0, "bf16"), _DYNAMIC), 15, True),
    ("decode, 8 x 7,936, bf16, level 0", "transformers, static cache",
     _peer("decode 8 x 7936", _OURS.format(0, "bf16"), _STATIC), None, True),
    ("decode, 1 x 7,936, int4, level 0", "llama.cpp",
     _peer("decode 1 x 7936", _OURS.format(0, "int4"), _LLAMA), 1.3, True),
    ("decode, 1 x 512, int4, level 0", "llama.cpp",
     _peer("decode 1 x 512", _OURS.format(0, "int4"), _LLAMA), 1.0, True),
    *((f"prefill, {tokens:,}, {weights}, level 0", "llama.cpp",
       _peer(f"prefill {tokens}", _OURS.format(0, weights), _LLAMA), 3, True)
      for tokens in (2048, 7936) for weights in ("int4", "bf16")),
    ("prefill, 2,048, bf16, level 0", "transformers",
     _peer("prefill 2048", _OURS.format(0, "bf16"), _DYNAMIC), 1, True),
    ("prefill, 7,936, bf16, level 0", "transformers",
     _peer("prefill 7936", _OURS.format(0, "bf16"), _DYNAMIC), 1, True),
    ("attention of decode, 8 x 7,936, level 0", "read bandwidth of memory", _attention_share, 0.6, True),
    ("decode, 8 x 7,936, level 23", "level 0", _engine("against_level_0", "decode_ratio"), 1.6, True),
    ("prefill, 7,936, level 23", "level 0", _engine("against_level_0", "prefill_ratio"), 1.25, True),
    ("equal bytes: tokens a second, level 23", "level 0", _engine("equal_bytes", "speed_ratio"), 2.3, True),
    ("equal bytes: requests, level 23", "level 0", _engine("equal_bytes", "request_ratio"), 3, True),
    ("converting 15 layers of 7,936 tokens", "prefill of them", _engine("conversion", "share"), 0.04, False),
    ("longest step while they are converted", "the bound of a step", _longest_step, 1, False),
    ("first token of a second turn, worst level", "cold prefill", _engine("second_turn", "worst_share"), 0.05, False),
    ("goodput, Mooncake conversation, 1.5 x capacity", "level 0",
     _goodput("mooncake_conversation", "1.5"), 1.3, True),
    ("goodput, Mooncake conversation, least over the rates", "level 0", _least_goodput("mooncake_conversation"), 1, True),
    ("goodput, Azure conversation, least over the rates", "level 0", _least_goodput("azure2023_conv"), 1, True),
    ("tokens a second of 32 streams, 256 + 128 tokens each", "the engine driven directly", _http, 0.95, True),
    ("accepted requests without a complete answer", "none", _lost, 0, False),
)  # fmt: skip


def bars_table(kinds: dict[str, dict[str, Any]]) -> str:
    """The table of bars as Markdown, a column for each kind of processor; a figure whose result is not there is not measured.

    Args:
        kinds: kind of processor -> name of a result -> the result.
    """
    names = [INSTRUCTIONS[kind][0] for kind in kinds]
    lines = [f"| {' | '.join(('work', 'against', 'bar', *names))} |", "|---" * (3 + len(names)) + "|"]
    for work, against, figure, bar, more in BARS:
        wanted = "" if bar is None else f"{'>=' if more else '<='} {bar:g}"
        cells = (_cell(results, figure, bar, more) for results in kinds.values())
        lines.append(f"| {' | '.join((work, against, wanted, *cells))} |")
    for kind, results in kinds.items():
        runs = (f"{name}: {found['origin']['machine']}, {found['origin']['date']}" for name, found in results.items())
        lines += ["", f"{INSTRUCTIONS[kind][0]}: {'; '.join(runs)}."]
    return "\n".join(lines)


def _cell(results: dict[str, Any], figure: Callable[[dict[str, Any]], float], bar: float | None, more: bool) -> str:
    try:
        found = figure(results)
    except (KeyError, ValueError):
        return "not measured"
    missed = bar is not None and not (found >= bar if more else found <= bar)
    return f"{found:.3g}{', **missed**' if missed else ''}"


def goodput_table(kinds: dict[str, dict[str, Any]]) -> str:
    """Every replay of a trace, as Markdown: how many requests, and how many of them met both objectives."""
    lines = [
        "| processor | trace | rate, x capacity | requests (left out) | met, level 0 | met, adaptive | mean level | goodput |",
        "|---" * 8 + "|",
    ]
    for kind, results in kinds.items():
        for name, trace in results.get("serving", {"traces": {}})["traces"].items():
            for rate, row in trace["rates"].items():
                fixed, adaptive = row["level 0"], row["adaptive"]
                lines.append(
                    f"| {INSTRUCTIONS[kind][0]} | {name} | {rate} | {fixed['requests']} ({trace['dropped']}) | {fixed['met']} "
                    f"| {adaptive['met']} | {adaptive['mean_level']:.1f} | {row['goodput_ratio']:.2f}x |"
                )
    return "\n".join(lines)


RUNS = {
    "schedules": "random schedules, each request against its own replay alone",
    "soak": "engines that go on all the time",
    "fuzz": "requests made from the server's OpenAPI schema",
    "chaos": "clients that vanish, levels that change, restarts",
    "connections": "as many streams at once, to a server of a tiny model",
}
"""Name of a result of a slow test -> what was run."""


def runs_table(results: dict[str, dict[str, Any]]) -> str:
    """What happened in long random runs, as Markdown; those whose result is not there were not run.

    Args:
        results: name of a run -> its result.
    """
    lines = ["| run | what happened in it |", "|---|---|"]
    for name, what in RUNS.items():
        found = results.get(name)
        counts = ", ".join(f"{key} {value:,g}" for key, value in (found or {}).items() if key != "origin") or "not run"
        lines.append(f"| {name}: {what} | {counts} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its generated blocks made anew."""
    kinds = {
        kind: {
            name: json.loads((RESULTS / kind / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("peers", "engine", "serving", "http")
            if (RESULTS / kind / f"{name}.json").is_file()
        }
        for kind in INSTRUCTIONS
    }
    runs = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in RUNS
        if (path := RESULTS / f"{name}.json").is_file()
    }
    measured = {kind: results for kind, results in kinds.items() if results}
    for name, table in (
        ("runs", runs_table(runs)),
        ("bars", bars_table(measured)),
        ("goodput", goodput_table(measured)),
    ):
        text = fill(text, name, table)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
