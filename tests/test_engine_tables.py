"""`docs/benchmarks.md`: the figures of the engine's bars are those of the committed results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("engine_tables")


def test_figures_are_those_of_the_result_files(tables: Any) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert tables.page(page) == page, "run `python benchmarks/engine_tables.py`"


def test_a_figure_without_a_result_is_not_measured(tables: Any) -> None:
    table = tables.bars_table({"avx2": {}})
    assert table.count("not measured") == len(tables.BARS)


def test_a_bar_that_is_missed_says_so(tables: Any) -> None:
    machine = {"origin": {"machine": "m", "date": "2026-01-01"}}
    found = {"engine": {"against_level_0": {"decode_ratio": 1.5}, "conversion": {"share": 0.01}, **machine}}
    rows = tables.bars_table({"avx2": found, "amx": {}}).splitlines()
    assert next(r for r in rows if r.startswith("| decode, 8 x 7,936, level 23")).endswith(
        "| 1.5, **missed** | not measured |"
    )
    assert next(r for r in rows if r.startswith("| converting")).endswith("| 0.01 | not measured |")
    assert "AVX2: engine: m, 2026-01-01." in rows


def test_random_runs_are_told_with_their_counts(tables: Any) -> None:
    table = tables.runs_table({"soak": {"origin": {}, "seconds": 1800.0, "requests": 12345}})
    assert table.count("not run") == len(tables.RUNS) - 1 and "seconds 1,800, requests 12,345 |" in table


def test_replays_are_told_with_their_counts(tables: Any) -> None:
    side = {"requests": 24, "met": 20, "mean_level": 3.14}
    row = {"level 0": side | {"met": 3}, "adaptive": side, "goodput_ratio": 10.06}
    table = tables.goodput_table(
        {"amx": {"serving": {"traces": {"t": {"dropped": 23, "rates": {"1.5": row}}}}}, "avx2": {}}
    )
    assert table.splitlines()[2:] == ["| AMX (bfloat16) | t | 1.5 | 24 (23) | 3 | 20 | 3.1 | 10.06x |"]
