"""Plans as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsla.convert.plan import Plan, Teacher
from dsla.errors import PlanError
from dsla.mixers import DslaConfig


def test_round_trip(tmp_path: Path) -> None:
    plan = Plan(
        Teacher("m", "a" * 64, 4),
        (3, 1, 0, 2),
        DslaConfig(window=8),
        "kl",
        {"kl": (1.0, 2.0, 3.0, 0.5)},
        {"torch": "2"},
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_levels_are_prefixes() -> None:
    plan = Plan(Teacher("m", "a" * 64, 4), (3, 1, 0))
    assert plan.layers(0) == () and plan.layers(2) == (3, 1) and plan.max_level == 3
    for level in (-1, 4):
        with pytest.raises(PlanError, match="out of range: this plan has levels 0 to 3"):
            plan.layers(level)
