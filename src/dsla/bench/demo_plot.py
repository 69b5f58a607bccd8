"""The demo's picture: memory against the budget, levels, and speed over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsla.bench.demo import Sample, StreamResult

_KV, _STATES, _LEVEL, _READ = "#4c78a8", "#e45756", "#2f6b3c", "#72629b"
_INK, _FAINT = "#222222", "#8a8a8a"
_MIB = 1 << 20
_SMOOTH_STEPS = 5


def plot_demo(
    samples: Sequence[Sample], results: Sequence[StreamResult], budget_bytes: int, top_level: int, path: Path
) -> None:
    """Draws the picture.

    Args:
        samples: what `Demo.run` gave, at least one.
        results: how the streams ended.
        budget_bytes: the memory budget.
        top_level: highest level of the model.
        path: the PNG to write.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = [result.prompt_tokens for result in results]
    title = f"{len(results)} prompts of {min(lengths):,} to {max(lengths):,} tokens at once, in {budget_bytes / _MIB:,.0f} MiB"
    what = "When memory gets short, layers of running requests are converted: KV caches become small states."
    done = sum(result.finished for result in results)
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(
            3, 1, figsize=(8.6, 8.2), sharex=True, layout="constrained", height_ratios=(3.2, 2, 1.7)
        )
        figure.suptitle(f"{title}\n\n", fontsize=12.5, fontweight="bold", color=_INK, x=0.01, ha="left")
        seconds = np.array([sample.seconds for sample in samples])
        figure.text(0.01, 0.955, f"{what}\n{done} of {len(results)} requests finished.", color=_INK, va="top")
        _memory(axes[0], seconds, samples, budget_bytes)
        _levels(axes[1], seconds, samples, top_level)
        _speed(axes[2], seconds, samples)
        axes[0].set_xlim(0, seconds[-1])
        axes[2].set_xlabel("seconds since the prompts arrived", color=_INK)
        read = max((sample.seconds for sample in samples if sample.prompt_tokens), default=0.0)
        for axis in axes:
            axis.tick_params(colors=_INK)
        axes[2].axvline(read, color=_FAINT, lw=0.8, ls=(0, (2, 3)), zorder=0.5)
        axes[2].annotate(
            "all prompts read", (read, 0.05), (-4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="right", va="bottom", color=_FAINT, fontsize=9,
        )  # fmt: skip
        figure.savefig(path, dpi=150, facecolor="white")
        pyplot.close(figure)


def _memory(axis: Any, seconds: np.ndarray, samples: Sequence[Sample], budget_bytes: int) -> None:
    kv, states, level_0 = (
        np.array([getattr(sample, name) for sample in samples]) / _MIB
        for name in ("kv_bytes", "state_bytes", "level_0_bytes")
    )
    seconds, kv, states, level_0 = (np.concatenate([[0.0], values]) for values in (seconds, kv, states, level_0))
    budget = budget_bytes / _MIB
    axis.stackplot(seconds, kv, states, colors=(_KV, _STATES), lw=0)
    axis.plot(seconds, level_0, color=_INK, lw=1.6, ls=(0, (4, 2)))
    axis.axhline(budget, color=_INK, lw=1.6)
    axis.set_ylim(0, 1.12 * max(level_0.max(), budget))
    _head(axis, "Memory of all requests, MiB")
    peak = int(level_0.argmax())
    text = f"with full attention (level 0) the same tokens take {level_0[peak]:,.0f} MiB"
    axis.annotate(text, (seconds[peak], level_0[peak]), (-4, 5), textcoords="offset points", ha="right", color=_INK)
    axis.annotate(
        f"budget {budget:,.0f} MiB", (0, budget), (6, 4), textcoords="offset points", color=_INK, fontweight="bold"
    )
    axis.annotate(
        "KV caches", (seconds[peak], kv[peak] * 0.3), (-14, 0), textcoords="offset points", ha="right", va="center",
        color="white", fontweight="bold",
    )  # fmt: skip
    if states.max():
        place = int(states.argmax())
        axis.annotate(
            f"states of converted layers, {states[place]:,.0f} MiB",
            (seconds[place], kv[place] + states[place] / 2),
            (seconds[peak] - 0.02 * seconds[-1], kv[peak] * 0.6),
            ha="right", va="center", color="white", fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": "white", "lw": 1.0},
        )  # fmt: skip


def _levels(axis: Any, seconds: np.ndarray, samples: Sequence[Sample], top_level: int) -> None:
    levels = np.array([sample.levels for sample in samples])
    mean, high = levels.mean(1), levels.max(1)
    axis.plot(seconds, levels, color=_LEVEL, lw=0.8, alpha=0.35, drawstyle="steps-post")
    axis.plot(seconds, high, color=_LEVEL, lw=1.4, ls=(0, (4, 2)), drawstyle="steps-post")
    axis.plot(seconds, mean, color=_LEVEL, lw=2.4, drawstyle="steps-post")
    axis.set_ylim(0, top_level * 1.12 + 0.5)
    axis.yaxis.get_major_locator().set_params(integer=True)
    text = f"Level: how many layers of a request are converted, of at most {top_level} (thin: each request)"
    _head(axis, text)
    end = seconds[-1]
    for text, value, above in (("highest", high[-1], True), ("mean", mean[-1], False)):
        axis.annotate(
            f"{text} {value:.0f}", (end, value), (-4, 4 if above else -5), textcoords="offset points", ha="right",
            va="bottom" if above else "top", color=_LEVEL, fontweight="bold",
        )  # fmt: skip


def _speed(axis: Any, seconds: np.ndarray, samples: Sequence[Sample]) -> None:
    steps = np.array([sample.step_seconds for sample in samples])
    read, written = (
        _rate(np.array([getattr(sample, name) for sample in samples]), steps)
        for name in ("prompt_tokens", "generated_tokens")
    )
    axis.set_yscale("log")
    for rate, color, text, place in (
        (read, _READ, "prompt tokens read", 0.5),
        (written, _KV, "tokens written", 0.7),
    ):
        shown = np.where(rate > 0, rate, np.nan)
        axis.plot(seconds, shown, color=color, lw=1.8)
        known = np.flatnonzero(rate > 0)
        if known.size:
            left, right = seconds[known[0]], seconds[known[-1]]
            at = int(np.searchsorted(seconds, left + place * (right - left)))
            axis.annotate(
                text, (seconds[at], rate[at]), (0, 7), textcoords="offset points", ha="center", color=color,
                fontweight="bold",
            )  # fmt: skip
    both = np.concatenate([read[read > 0], written[written > 0]])
    if both.size:
        axis.set_ylim(max(both.min() / 3, 0.1), both.max() * 3)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.minorticks_off()
    _head(axis, "Tokens per second, of all requests")


def _rate(tokens: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Tokens a second, over a few steps around each."""
    window = np.ones(min(_SMOOTH_STEPS, len(tokens)))
    time = np.convolve(seconds, window, "same")
    return np.convolve(tokens, window, "same") / np.maximum(time, 1e-9)


def _head(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, color=_INK)
