"""Writes the tables of `docs/orders.md` from the committed results of `orders.py`.

python benchmarks/orders_tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from tables import ROOT, fill

PAGE = ROOT / "docs" / "orders.md"
_RANDOM = "random"


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads((ROOT / "benchmarks" / "results" / "orders.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def levels_table(results: dict[str, Any], way: str) -> str:
    """KL and perplexity of every order at every level, best first; of random orders the mean, and the range of the KL.

    Args:
        results: the committed results.
        way: `floor` or `trained`, how the layers were converted.
    """
    levels = [str(level) for level in results["levels"]]
    columns = ["order", "KL against the best", *(f"level {level}: KL; perplexity" for level in levels), "trials"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    groups = _groups(results)
    behind = {name: _behind(results, group, way) for name, group in groups.items()}
    for name in sorted(groups, key=behind.__getitem__):
        group = groups[name]
        cells = [f"`{name}`", f"{behind[name]:.2f}x"]
        for level in levels:
            kls = [_kl(entry, level, way) * 1000 for entry in group]
            spread = f" ({min(kls):.1f} to {max(kls):.1f})" if len(kls) > 1 else ""
            ratios = [statistics.mean(e["at"][level][way][text]["ratio"] for e in group) for text in ("books", "other")]
            cells.append(f"{statistics.mean(kls):.1f}{spread}; {ratios[0]:.3f} / {ratios[1]:.3f}")
        trials = group[0]["trials"]
        lines.append(f"| {' | '.join([*cells, '-' if trials is None else str(trials)])} |")
    return "\n".join(lines)


def orders_table(results: dict[str, Any]) -> str:
    """The orders themselves."""
    lines = ["| order | layers, least sensitive first |", "|---|---|"]
    lines += [f"| `{entry['name']}` | {' '.join(map(str, entry['order']))} |" for entry in results["orders"]]
    return "\n".join(lines)


def reading(results: dict[str, Any]) -> str:
    """What the tables say."""
    groups = _groups(results)
    trained, floor = (
        {name: f"{_behind(results, group, way):.2f}x" for name, group in groups.items()} for way in ("trained", "floor")
    )
    (chance,) = (name for name in groups if name.startswith(_RANDOM))
    trials = {name: group[0]["trials"] for name, group in groups.items()}
    pairs = list(zip(_by_window(results, groups["greedy"][0]), _by_window(results, groups["kl"][0]), strict=True))
    differ = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    lines = [
        f"- **Default: `greedy`.** With trained layers, which is what users get, it is the best of what needs no adapter: "
        f"{trained['greedy']} the best KL, `kl` {trained['kl']}. At the floor they are {floor['greedy']} and {floor['kl']}. "
        f"With trained layers `greedy` has the lower KL in {sum(ours < theirs for ours, theirs in differ)} of the "
        f"{len(differ)} windows and levels in which they differ: a lead, not a landslide. "
        f"Where its {trials['greedy']} trials ({trials['kl']} for `kl`) are too many, `kl` is the one to take.",
        f"- What the text is made of weighs as much: `kl` on a balanced four windows of 512 tokens is {trained['kl']}, on the "
        f"eight windows of 1,024 the adapter's order was measured on, drawn by size, {trained['kl_8_windows']}.",
        f"- Trained layers in the trials (`--adapter`): `kl_trained` {trained['kl_trained']}, `greedy_trained` "
        f"{trained['greedy_trained']}.",
        f"- Of the metrics without trials `retrieval` comes nearest ({trained['retrieval']}), `outliers` is at "
        f"{trained['outliers']}. `entropy` ({trained['entropy']}) does worse than chance ({trained[chance]}) on this model: it "
        "sees how few tokens a layer reads, but not whether they lie beyond window and sinks.",
    ]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with every generated block made anew."""
    results = load()
    blocks: dict[str, Callable[[], str]] = {
        "trained": lambda: levels_table(results, "trained"),
        "floor": lambda: levels_table(results, "floor"),
        "orders": lambda: orders_table(results),
        "reading": lambda: reading(results),
    }
    for name, content in blocks.items():
        text = fill(text, name, content())
    return text


def _groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Orders by name, the random ones together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results["orders"]:
        name = f"{_RANDOM}, mean of" if entry["metric"] == _RANDOM else entry["name"]
        groups.setdefault(name, []).append(entry)
    return {f"{name} {len(group)}" if name.startswith(_RANDOM) else name: group for name, group in groups.items()}


def _behind(results: dict[str, Any], group: list[dict[str, Any]], way: str) -> float:
    """KL over that of the best order of the level: geometric mean over the levels and the group."""
    return statistics.geometric_mean(
        _kl(entry, str(level), way) / min(_kl(other, str(level), way) for other in results["orders"])
        for entry in group
        for level in results["levels"]
    )


def _by_window(results: dict[str, Any], entry: dict[str, Any]) -> list[float]:
    """KL with trained layers of every window at every level."""
    at = [entry["at"][str(level)]["trained"] for level in results["levels"]]
    return [kl for found in at for text in ("books", "other") for kl in found[text]["kl_by_window"]]


def _kl(entry: dict[str, Any], level: str, way: str) -> float:
    found = entry["at"][level][way]
    return statistics.mean(found[text]["kl"] for text in ("books", "other"))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
