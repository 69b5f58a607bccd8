"""Pictures of benchmark records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_INK, _FAINT, _GRID = "#222222", "#8a8a8a", "#e4e4e4"
_COLORS = ("#4c78a8", "#e45756", "#54a24b", "#f2a541", "#72629b", "#5f9ea0", "#b279a2", "#9d755d")
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _FAINT,
    "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip


def plot_crossover(record: dict[str, Any], path: Path) -> None:
    """Draws prefill and decode against the context, a line a level, with the roofline of decode beside it.

    Args:
        record: what `crossover.measure` gave.
        path: the PNG to write.

    Raises:
        OSError: it cannot be written.
    """

    def draw(pyplot: Any) -> Any:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
        settings, contexts = record["settings"], record["settings"]["contexts"]
        for color, row in zip(_cycled(len(record["rows"])), record["rows"], strict=True):
            label, decode = f"level {row['level']}", [1e3 * s for s in row["decode_seconds"]]
            left.plot(contexts, row["prefill_tokens_per_second"], color=color, marker="o", ms=3, label=label)
            right.plot(contexts, decode, color=color, marker="o", ms=3, label=label)
            bound = [1e3 * s for s in row["decode_roofline_seconds"]]
            right.plot(contexts, bound, color=color, lw=0.9, ls=(0, (4, 2)))
        right.plot([], [], color=_FAINT, lw=0.9, ls=(0, (4, 2)), label="bytes moved / read bandwidth")
        left.set_title("Prefill of one prompt, tokens a second")
        right.set_title(f"Decode, ms a step of {settings['batch']} request{'s' * (settings['batch'] > 1)}")
        for axis in (left, right):
            axis.set_xlabel("context, tokens")
            axis.set_ylim(bottom=0)
            axis.legend()
        return figure

    _save(draw, path)


def plot_sweeps(records: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Draws goodput and latencies over the arrival rate, a row of plots a trace, a colour a record.

    Args:
        records: name and record of `dsla bench serve` of each; at least one, with at least one run.
        path: the PNG to write.

    Raises:
        OSError: it cannot be written.
    """
    traces = list(dict.fromkeys(run["trace"] for _, record in records for run in record["runs"]))

    def draw(pyplot: Any) -> Any:
        figure, grid = pyplot.subplots(
            len(traces), 3, figsize=(12, 3.6 * len(traces)), layout="constrained", squeeze=False
        )
        for axes, trace in zip(grid, traces, strict=True):
            axes[0].set_ylabel(trace)
            for color, (name, record) in zip(_cycled(len(records)), records, strict=True):
                runs = sorted((run for run in record["runs"] if run["trace"] == trace), key=lambda run: run["rate"])
                _goodput(axes[0], name, runs, color)
                _latency(axes[1], name, runs, "ttft", color)
                _latency(axes[2], name, runs, "tpot", color)
            objectives = records[0][1]["settings"]["objectives"]
            titles = (("Goodput, requests a second", None), ("TTFT, s", "ttft"), ("TPOT, s", "tpot"))
            for axis, (title, objective) in zip(axes, titles, strict=True):
                if objective and objectives[objective] is not None:
                    axis.axhline(objectives[objective], color=_INK, lw=0.9, ls=(0, (1, 2)), label="objective")
                axis.set_title(title)
                axis.set_xlabel("arrivals a second")
                axis.set_ylim(bottom=0)
                axis.legend(fontsize=7)
        return figure

    _save(draw, path)


def _goodput(axis: Any, name: str, runs: Sequence[dict[str, Any]], color: str) -> None:
    rates = [run["rate"] for run in runs]
    axis.plot(rates, rates, color=_GRID, lw=1.2, zorder=0.5)
    axis.plot(rates, [run["summary"]["goodput"] for run in runs], color=color, marker="o", ms=3, label=name)


def _latency(axis: Any, name: str, runs: Sequence[dict[str, Any]], what: str, color: str) -> None:
    known = [run for run in runs if run["summary"][what]]
    for percentile, style in (("p50", "-"), ("p90", (0, (4, 2))), ("p99", (0, (1, 1)))):
        values = [run["summary"][what][percentile] for run in known]
        label = f"{name} {percentile}"
        axis.plot([run["rate"] for run in known], values, color=color, ls=style, marker="o", ms=2, label=label)


def _cycled(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def _save(draw: Callable[[Any], Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure = draw(pyplot)
        figure.savefig(path, dpi=150, facecolor="white")
        pyplot.close(figure)
