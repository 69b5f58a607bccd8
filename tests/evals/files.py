"""Tiny evaluation data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from dsla.evals.harness import SOURCES

NOUNS = ("fox", "dog", "duck", "lion", "lamp", "river", "stone", "cloud")


def write(path: Path, records: Iterable[Any]) -> None:
    """Records as lines of a `.gz` or `.zst` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data))


def choice_record(name: str, i: int) -> dict[str, Any]:
    """A question of a multiple-choice task; tasks of letters and ARC have 3 to 5 choices."""
    count = (
        2 if name in ("winogrande", "piqa", "boolq_closed") else 4 if name in ("hellaswag", "openbookqa") else 3 + i % 3
    )
    noun = NOUNS[i % len(NOUNS)]
    context = f"The {noun} saw the _ and it was {i} again" if name == "winogrande" else f"The quick {noun} number {i}"
    choices = [f"{NOUNS[(i + j) % len(NOUNS)]} {'over the lazy dog ' * j}jumps" for j in range(count)]
    extra = {"subject": "brown_foxes"} if name == "mmlu" else {}
    return {
        "id": f"{name}-{i}",
        "context": context,
        "choices": choices,
        "answer_index": i % count,
        "more": [1],
        **extra,
    }


def write_choices(data: Path, count: int = 12) -> Path:
    """A file of every task the harness scores."""
    for name, source in SOURCES.items():
        if "choices" in source.schema:
            write(data / source.file, (choice_record(name, i) for i in range(count)))
    sums = ({"id": f"gsm8k-{i}", "question": f"{i} and 1?", "answers": [str(i % 4)]} for i in range(count))
    write(data / SOURCES["gsm8k"].file, sums)
    return data
