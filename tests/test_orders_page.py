"""`docs/orders.md`: its figures are those of the committed result, and the default is the metric it recommends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsla.distill.recipe import OrderSettings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("orders_tables")


def test_figures_are_those_of_the_result_file(tables: Any) -> None:
    page = (ROOT / "docs" / "orders.md").read_text(encoding="utf-8")
    assert tables.page(page) == page, "run `python benchmarks/orders_tables.py`"


def test_default_is_the_best_metric_that_needs_no_adapter(tables: Any) -> None:
    results = tables.load()
    groups = {name: group for name, group in tables._groups(results).items() if not group[0]["trained"]}
    fresh = {group[0]["metric"]: group for name, group in groups.items() if group[0]["trials"] is not None}
    best = min(fresh, key=lambda metric: tables._behind(results, fresh[metric], "trained"))
    assert OrderSettings().metric == best
