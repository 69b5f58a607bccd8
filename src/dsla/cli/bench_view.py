"""How benchmark records are shown on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_NONE = "-"
_LATE_SECONDS = 0.1
_PERCENTILES = ("p50", "p90", "p99")
_P = " ".join(_PERCENTILES)


def show_crossover(record: dict[str, Any]) -> None:
    """A table of speeds by level and context, and where each level begins to be faster than level 0."""
    settings, contexts = record["settings"], record["settings"]["contexts"]
    bandwidth = max(record["read_bandwidth"]) / 1e9
    table = Table(
        title=f"{settings['model']}: decode of {settings['batch']} at once; memory reads {bandwidth:.1f} GB/s"
    )
    for name in ("level", "context", "prefill s", "tokens/s", "decode ms", "bound ms", "bytes MB"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        for i, context in enumerate(contexts):
            table.add_row(
                str(row["level"]) if not i else "",
                f"{context:,}",
                f"{row['prefill_seconds'][i]:.2f}",
                f"{row['prefill_tokens_per_second'][i]:,.0f}",
                f"{1e3 * row['decode_seconds'][i]:.1f}",
                f"{1e3 * row['decode_roofline_seconds'][i]:.1f}",
                f"{row['decode_bytes'][i]['total'] / 1e6:,.0f}",
                end_section=i + 1 == len(contexts),
            )
    points = Table(title="Faster than level 0 from")
    for name in ("level", "prefill", "decode"):
        points.add_column(name, justify="right")
    for row in record["rows"]:
        if row["level"]:
            found = (_context(row[f"{name}_crossover"], contexts) for name in ("prefill", "decode"))
            points.add_row(str(row["level"]), *found)
    console = Console()
    console.print(table)
    if points.row_count:
        console.print(points)


def show_sweep(record: dict[str, Any]) -> None:
    """A table of each trace, a row a rate."""
    objectives = record["settings"]["objectives"]
    words = [f"{name.upper()} <= {value:g} s" for name, value in objectives.items() if value is not None]
    console = Console()
    console.print(f"{record['server']['model']}; goodput counts {' and '.join(words) or 'every answer'}")
    for trace in dict.fromkeys(run["trace"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["trace"] == trace]
        names = (
            "rate\n/s",
            "goodput\n/s",
            "in\ntime",
            "tokens\n/s",
            f"TTFT, s\n{_P}",
            f"TPOT, ms\n{_P}",
            "rejected,\nfailed",
        )
        table = _table(f"{trace}, {runs[0]['dropped']:,} dropped", names)
        for run in runs:
            found = run["summary"]
            table.add_row(
                f"{run['rate']:.3g}",
                f"{found['goodput']:.3g}",
                f"{100 * found['met_share']:.0f}%",
                f"{found['output_tokens_per_second']:,.1f}",
                " ".join(_ttft(found, p) for p in _PERCENTILES),
                " ".join(_tpot(found, p) for p in _PERCENTILES),
                f"{found['rejected']}, {found['failed']}",
            )
        console.print(table)
    _say_what_is_odd(console, record)


def show_comparison(names: Sequence[str], pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Goodput and latencies of two records side by side, a table a trace.

    Args:
        names: of both.
        pairs: runs of the same trace at the same rate.
    """
    console = Console()
    console.print(f"A: {names[0]}, B: {names[1]}")
    heads = ("goodput", "in time", "TTFT p90, s", "TPOT p90, ms")
    columns = ("rate\n/s", "B / A", *(f"{head}\n{side}" for head in heads for side in "AB"))
    for trace in dict.fromkeys(pair[0]["trace"] for pair in pairs):
        table = _table(trace, columns)
        for pair in (pair for pair in pairs if pair[0]["trace"] == trace):
            both = [run["summary"] for run in pair]
            table.add_row(
                f"{pair[0]['rate']:.3g}",
                f"{both[1]['goodput'] / both[0]['goodput']:.2f}" if both[0]["goodput"] else _NONE,
                *(f"{found['goodput']:.3g}" for found in both),
                *(f"{100 * found['met_share']:.0f}%" for found in both),
                *(_ttft(found, "p90") for found in both),
                *(_tpot(found, "p90") for found in both),
            )
        console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _say_what_is_odd(console: Console, record: dict[str, Any]) -> None:
    runs = record["runs"]
    if not any(run["summary"]["met"] for run in runs):
        console.print("Not one answer counts: the objectives are beyond this server, or the rates are.")
    if short := sum(run["summary"]["short"] for run in runs):
        console.print(f"{short} answers were shorter than asked for: this server ends them at its end token.")
    if unsent := sum(run["unsent"] for run in runs):
        console.print(f"The run was stopped: {unsent} requests were never sent.")
    lag = max(run["summary"]["client_lag"] for run in runs)
    if lag > _LATE_SECONDS:
        console.print(f"Requests were sent up to {lag:.2f} s late: this machine is too busy to send them in time.")


def _ttft(found: dict[str, Any], percentile: str) -> str:
    return f"{found['ttft'][percentile]:.2f}" if found["ttft"] else _NONE


def _tpot(found: dict[str, Any], percentile: str) -> str:
    return f"{1e3 * found['tpot'][percentile]:.0f}" if found["tpot"] else _NONE


def _context(found: float | None, measured: Sequence[int]) -> str:
    if found is None:
        return f"not up to {measured[-1]:,}"
    return f"<= {measured[0]:,}" if found <= measured[0] else f"{found:,.0f}"
