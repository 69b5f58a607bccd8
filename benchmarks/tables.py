"""Writes the README's table of levels from the committed results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CONTEXT = 8192
_MIB = 2**20


def levels_table(results: dict[str, Any]) -> str:
    """The table of levels as Markdown."""
    columns = (
        "level",
        "layers converted",
        "WikiText-2 perplexity",
        "against level 0 (floor)",
        "books of 4,096 tokens (floor)",
        "memory of a request of 8,192 tokens",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    base = results["rows"][0]
    for row in results["rows"]:
        level = row["level"]
        kept = results["n_layers"] - level
        memory = kept * _CONTEXT * results["kv_bytes_per_token_and_layer"] + level * results["dsla_bytes_per_layer"]
        full = results["n_layers"] * _CONTEXT * results["kv_bytes_per_token_and_layer"]
        cells = [
            str(level),
            f"{level / results['n_layers']:.0%}",
            f"{row['wikitext2_1k']:.2f}",
            _ratios(row, base, "wikitext2_1k"),
            _ratios(row, base, "books_4k"),
            f"{memory / _MIB:.0f} MiB ({memory / full:.0%})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    added = results["adapter_memory_bytes"] / results["teacher_bytes"]
    lines += [
        "",
        f"All {results['adapter_layers']} levels together add {results['adapter_memory_bytes'] / _MIB:.1f} MiB to the "
        f"model's {results['teacher_bytes'] / _MIB:.0f} MiB ({added:.1%}); on disk the adapter is "
        f"{results['adapter_disk_bytes'] / _MIB:.1f} MiB. A converted layer takes "
        f"{results['dsla_bytes_per_layer'] / 1024:.0f} KiB a request, whatever its length: it pays from "
        f"{results['break_even_tokens']:.0f} tokens on.",
    ]
    return "\n".join(lines)


def _ratios(row: dict[str, Any], base: dict[str, Any], text: str) -> str:
    ratio = f"{row[text] / base[text]:.3f}x"
    return f"{ratio} ({row[f'{text}_floor'] / base[text]:.3f}x)" if row["level"] else ratio


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    pattern = re.compile(rf"(<!-- {name}: .*?-->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda found: found.group(1) + content + found.group(2), text)
    if count != 1:
        raise ValueError(f"expected one block {name!r}, found {count}")
    return filled


def readme(text: str) -> str:
    """The README with every generated block made anew."""
    results = json.loads((ROOT / "benchmarks" / "results" / "levels.json").read_text(encoding="utf-8"))
    return fill(text, "levels", levels_table(results))


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
