"""Pictures of a report, as SVG text that needs nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from dsla.evals.tables import Report, name_of

_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_INK, _FAINT, _GRID = "#222222", "#8a8a8a", "#e4e4e4"
_COLORS = ("#4c78a8", "#54a24b", "#f2a541", "#e45756", "#72629b", "#5f9ea0", "#b279a2", "#9d755d")


def plots(report: Report) -> dict[str, str]:
    """Name -> SVG of every picture the report has something for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn: dict[str, str] = {}
    style: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dsla", "svg.fonttype": "none",
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _FAINT,
    }  # fmt: skip
    makers: dict[str, Callable[[Any, Report], Any]] = {
        "glance": _glance, "tasks": _tasks, "positions": _positions, "depths": _depths,
    }  # fmt: skip
    for name, make in makers.items():
        with pyplot.rc_context(style):
            figure = make(pyplot, report)
            if figure is not None:
                text = io.StringIO()
                figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
                pyplot.close(figure)
                drawn[name] = _METADATA.sub("", text.getvalue()[text.getvalue().index("<svg") :])
    return drawn


def _with_states(report: Report) -> list[int]:
    """Places of the settings with all states, level 0 not among them."""
    return [at for at, setting in enumerate(report["settings"]) if setting["level"] and setting["states"] == "on"]


def _glance(pyplot: Any, report: Report) -> Any:
    """Quality against memory and speed."""
    texts = [row for row in report["tasks"] if row["metric"] == "nll"]
    places = [0, *_with_states(report)]
    if len(places) < 2 or not (texts or report["commonsense"]):
        return None
    length = max(report["memory"]["request_bytes"]["0"], key=int)
    levels = [report["settings"][at]["level"] for at in places]
    memory = [report["memory"]["request_bytes"][str(level)][length] / 2**20 for level in levels]
    speed = [report["speed"][str(level)]["decode"]["value"] for level in levels]
    lines = [
        (f"perplexity, {row['name'].split('/')[-1]}", [row["results"][at]["ratio"] for at in places], True)
        for row in texts
    ]
    if report["commonsense"]:
        results = report["commonsense"]["results"]
        lines.append(("commonsense", [results[at]["retention"] for at in places], False))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, across, label in (
        (axes[0], memory, f"memory of a request of {int(length):,} tokens, MiB"),
        (axes[1], speed, "tokens written a second"),
    ):
        for color, (name, figures, turned) in zip(_COLORS, lines, strict=False):
            values = [_turned(f, turned) for f in figures]
            axis.plot(across, [value for value, _, _ in values], "o-", color=color, label=name, ms=4, lw=1.4)
            for x, (_, low, high) in zip(across, values, strict=True):
                axis.plot([x, x], [low, high], color=color, lw=1)
        for x, level in zip(across, levels, strict=True):
            axis.annotate(str(level), (x, 1), (0, 6), textcoords="offset points", ha="center", color=_FAINT)
        axis.set_xlabel(label)
        axis.grid(color=_GRID, lw=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("share of the teacher that is left\n(perplexity: teacher's / level's)")
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle("Quality against memory and speed; the number is the level", x=0.01, ha="left", fontsize=10)
    return figure


def _turned(figure: dict[str, Any], turned: bool) -> tuple[float, float, float]:
    """Value, low and high; of ratios one over them."""
    value = figure["value"] if figure["value"] is not None else float("nan")
    low, high = (x if x is not None else value for x in (figure["low"], figure["high"]))
    return (1 / value, 1 / high, 1 / low) if turned else (value, low, high)


def _tasks(pyplot: Any, report: Report) -> Any:
    """What is left on each judged task, worst at the top."""
    places = _with_states(report)
    rows = [
        row for row in report["tasks"] if not row["not_judged"] and ({"ratio", "retention"} & set(row["results"][0]))
    ]
    if not places or not rows:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 0.9 + 0.34 * len(rows)), layout="constrained")
    for color, (order, at) in zip(_COLORS, enumerate(places), strict=False):
        shift = 0.5 * (order / max(len(places) - 1, 1) - 0.5)
        values = [
            _turned(result["ratio"], True)
            if "ratio" in (result := row["results"][at])
            else _turned(result["retention"], False)
            for row in rows
        ]
        heights = [height + shift for height in range(len(rows))]
        axis.plot(
            [value for value, _, _ in values], heights, "o", color=color, ms=4.5, label=name_of(report["settings"][at])
        )
        for height, (_, low, high) in zip(heights, values, strict=True):
            axis.plot([low, high], [height, height], color=color, lw=1.2)
    axis.axvline(1, color=_FAINT, lw=1, ls=(0, (3, 2)))
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", color=_GRID, lw=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel("share of the teacher that is left (perplexity: teacher's / level's), with its 95% interval")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(places))
    return figure


def _positions(pyplot: Any, report: Report) -> Any:
    """Perplexity ratio by position, with and without states."""
    texts = [row for row in report["tasks"] if row["metric"] == "nll"]
    if not texts or len(report["settings"]) < 2:
        return None
    figure, axes = pyplot.subplots(1, len(texts), figsize=(4.5 * len(texts), 3.4), squeeze=False, layout="constrained")
    levels = sorted({setting["level"] for setting in report["settings"]} - {0})
    dashes = {"on": "-", "off": (0, (4, 2)), "floor": (0, (1, 1.5))}
    for axis, row in zip(axes[0], texts, strict=True):
        teacher = row["results"][0]["parts"]
        for result in row["results"][1:]:
            if result["states"] in dashes:
                ratios = [result["parts"][label] / value for label, value in teacher.items()]
                color = _COLORS[levels.index(result["level"]) % len(_COLORS)]
                axis.plot(
                    range(len(ratios)),
                    ratios,
                    "o",
                    ls=dashes[result["states"]],
                    color=color,
                    ms=3,
                    lw=1.4,
                    label=name_of(result),
                )
        axis.set_xticks(range(len(teacher)), list(teacher))
        axis.set_title(row["name"], loc="left", fontsize=10)
        axis.set_xlabel("position in the window, tokens")
        axis.grid(axis="y", color=_GRID, lw=0.6)
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("perplexity / teacher's")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _depths(pyplot: Any, report: Report) -> Any:
    """Passkeys by depth and length."""
    rows = sorted(
        (row for row in report["tasks"] if row["name"].startswith("passkey/")),
        key=lambda row: int(row["name"].split("/")[1]),
    )
    if not rows or len(report["settings"]) < 2:
        return None
    figure, axes = pyplot.subplots(
        1, len(rows), figsize=(2.4 + 2.2 * len(rows), 3), squeeze=False, sharey=True, layout="constrained"
    )
    shown = [0, *_with_states(report)]
    for axis, row in zip(axes[0], rows, strict=True):
        depths = list(row["results"][0]["parts"])
        grid = [[row["results"][at]["parts"][depth] for depth in depths] for at in shown]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", alpha=0.75)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(depths)), [depth.removeprefix("depth ") for depth in depths])
        axis.set_title(f"{int(row['name'].split('/')[1]):,} tokens", loc="left", fontsize=10)
    axes[0][0].set_yticks(range(len(shown)), [name_of(report["settings"][at]) for at in shown])
    figure.supxlabel("depth of the pass key in the text", fontsize=9)
    return figure
