"""Writes the tables of `docs/recipe.md` from the committed results of the recipe search.

python benchmarks/recipe_tables.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from recipe_rows import QUESTIONS, ROWS, cost_key
from tables import ROOT, fill

PAGE = ROOT / "docs" / "recipe.md"
_SEEDS = ("base", "base, seed 1", "base, seed 2")


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads((ROOT / "benchmarks" / "results" / "recipe.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def question_table(results: dict[str, Any], question: str) -> str:
    """Quality of the rows of one question beside their bytes and times, the base first."""
    names = [row["name"] for row in ROWS if row["question"] == question and row["name"] in results["rows"]]
    names = names if question == "base" else ["base", *names]
    columns = ("row", "error, T = 512", "2k", "8k", "8k, states left out", "copy", "state KiB", "prefill 2k / 8k, ms")
    lines = _head(*columns, "fold 2k / 8k, ms")
    for name in names:
        row, cost = results["rows"][name], _cost(results, name)
        errors = [_error(row["mean"][key]) for key in ("512", "2k", "8k", "8k_off", "copy")]
        fold = f"{cost['fold_2k']:.0f} / {cost['fold_8k']:.0f}" if row["foldable"] else "not foldable"
        prefill = f"{cost['prefill_2k']:.0f} / {cost['prefill_8k']:.0f}"
        lines.append(_line(name, *errors, f"{row['state_bytes'] / 1024:.0f}", prefill, fold))
    return "\n".join(lines)


def softmax_line(results: dict[str, Any]) -> str:
    """What the teacher's own layer takes."""
    cost = results["time"]["milliseconds"]["softmax"]
    return f"The teacher's own layer takes {cost['prefill_2k']:.0f} / {cost['prefill_8k']:.0f} ms at 2k / 8k."


def states_table(results: dict[str, Any]) -> str:
    """Errors of 1, 2, 4 and 8 states, with 1 state as the measure."""
    lines = _head("window", "states", "T = 512", "2k", "8k", "4k-8k", "copy", "state KiB")
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in results["rows"].values():
        plain = set(row["mixer"]) <= {"n_states", "window"} and not row["lab"] and not row["train"]
        if plain and row["mixer"].get("window", 64) in (0, 16, 64):
            found[row["mixer"].get("window", 64), row["mixer"].get("n_states", 2)] = row
    for (window, states), row in sorted(found.items()):
        if (window, 1) not in found:
            continue
        cells = [_against(row["mean"], found[window, 1]["mean"], key) for key in ("512", "2k", "8k", "4k-8k", "copy")]
        lines.append(_line(window, states, *cells, f"{row['state_bytes'] / 1024:.0f}"))
    return "\n".join(lines)


def seeds_table(results: dict[str, Any]) -> str:
    """One state and two at the same seeds: same text, same order, same positions."""
    lines = _head("seed", "error at 2k, 1 state", "2 states", "8k, 1 state", "2 states", "4k-8k, 1 state", "2 states")
    rows = results["rows"]
    for seed in range(len(_SEEDS)):
        pair = [rows[f"{name}, seed {seed}" if seed else name]["mean"] for name in ("1 state", "base")]
        lines.append(_line(seed, *(_error(mean[key]) for key in ("2k", "8k", "4k-8k") for mean in pair)))
    return "\n".join(lines)


def extrapolation_table(results: dict[str, Any]) -> str:
    """Errors past the training length, with and without states, layer by layer."""
    lines = _head("layer", "windows", "error at 2k", "4k-8k", "4k-8k, states left out")
    for layer in map(str, results["layers"]):
        for name, windows in (("unshifted", "at 0 ... 2,047"), ("base", "shifted")):
            errors = results["rows"][name]["errors"][layer]
            lines.append(_line(layer, windows, *(_error(errors[key]) for key in ("2k", "4k-8k", "4k-8k_off"))))
    return "\n".join(lines)


def model_table(results: dict[str, Any], part: str) -> str:
    """KL from the teacher and the perplexity's ratio with the layers converted together; `part` is `model` or `chain`."""
    lines = _head("row", "KL, mixed text 2k", "book 8k", "its 4k-8k", "copy", "ratio, mixed 2k", "book 8k", "copy")
    for name, row in results[part].items():
        divergences = [_error(row[f"{key}_kl"]) for key in ("2k", "8k", "4k-8k", "copy")]
        ratios = [f"{row[f'{key}_ratio']:.4f}" for key in ("2k", "8k", "copy")]
        lines.append(_line(name, *divergences, *ratios))
    return "\n".join(lines)


def noise(results: dict[str, Any]) -> str:
    """How far seeds move the base."""
    parts = []
    for key, name in (("512", "T = 512"), ("2k", "2k"), ("8k", "8k"), ("copy", "copy")):
        values = [results["rows"][seed]["mean"][key] for seed in _SEEDS]
        parts.append(f"{(max(values) - min(values)) / statistics.fmean(values):.1%} at {name}")
    return f"Between the {len(_SEEDS)} seeds the base's errors spread by {', '.join(parts)} (largest minus smallest)."


def page(text: str) -> str:
    """`docs/recipe.md` with every generated block made anew."""
    results = load()
    for question in QUESTIONS:
        text = fill(text, question, question_table(results, question))
    text = fill(text, "second state", states_table(results))
    text = fill(text, "seeds", seeds_table(results))
    text = fill(text, "extrapolation", extrapolation_table(results))
    text = fill(text, "softmax", softmax_line(results))
    text = fill(text, "noise", noise(results))
    text = fill(text, "model", model_table(results, "model"))
    return fill(text, "chain", model_table(results, "chain"))


def _cost(results: dict[str, Any], name: str) -> dict[str, float]:
    return results["time"]["milliseconds"][cost_key(results["rows"][name])]  # type: ignore[no-any-return]


def _against(found: dict[str, float], base: dict[str, float], key: str) -> str:
    change = found[key] / base[key] - 1
    return _error(found[key]) + (f" ({change:+.1%})" if found is not base else "")


def _error(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3g}"


def _head(*columns: str) -> list[str]:
    return [_line(*columns), "|---" * len(columns) + "|"]


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
