"""Means, retention and intervals against arithmetic done by hand and against closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from dsla.evals.statistics import Pairs, estimate, retention
from dsla.evals.task import Item, Task


def task(metric: str = "accuracy", chance: float = 0.0, name: str = "t") -> Task:
    return Task(name=name, group="commonsense", metric=metric, run=lambda *_: iter(()), items=0, chance=chance)


def scored(scores: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, Item]:
    weights = weights if weights is not None else [1.0] * len(scores)
    return {str(i): Item(str(i), s, w) for i, (s, w) in enumerate(zip(scores, weights, strict=True))}


def test_retention_and_ratio_by_hand() -> None:
    pairs = Pairs(task(chance=0.25), [scored([1, 1, 1, 0]), scored([1, 0, 1, 0])])
    assert pairs.mean(0).value == 0.75 and pairs.mean(1).value == 0.5
    assert pairs.retention(1).value == 0.5
    assert pairs.retention(0).value == pairs.retention(0).low == pairs.retention(0).high == 1
    assert pairs.difference(1, 0).value == -0.25
    assert pairs.above_chance(0).value == 0.5

    losses = Pairs(task("nll"), [scored([1.0, 3.0], [10, 30]), scored([1.5, 3.0], [10, 30])])
    assert losses.mean(0).value == pytest.approx(math.exp(2.5))
    assert losses.ratio(1).value == pytest.approx(math.exp(0.125))
    assert losses.ratio(0).value == losses.ratio(0).high == 1


def test_retention_over_tasks_adds_up_before_it_divides() -> None:
    one = Pairs(task(chance=0.25, name="a"), [scored([1, 1, 1, 0]), scored([1, 0, 1, 0])])
    two = Pairs(task(chance=0.5, name="b"), [scored([1, 1, 1, 1]), scored([1, 1, 1, 0])])
    assert retention([one, two], 1).value == (0.25 + 0.25) / (0.5 + 0.5)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    scores = np.random.default_rng(1).normal(2.0, 3.0, 400)
    found = Pairs(task(), [scored(scores)]).mean(0)
    half = 1.96 * scores.std() / math.sqrt(400)
    assert found.value == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_what_levels_share_does_not_widen_the_interval() -> None:
    draw = np.random.default_rng(2)
    teacher = draw.normal(0, 10, 300)
    level = teacher - 0.5 + draw.normal(0, 0.1, 300)
    found = Pairs(task(), [scored(teacher), scored(level)]).difference(1, 0)
    half = 1.96 * (level - teacher).std() / math.sqrt(300)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.excludes(0) and not found.excludes(-0.5)


def test_weights_count() -> None:
    light = Pairs(task(), [scored([0.0, 1.0], [1, 3])])
    assert light.mean(0).value == 0.75
    assert (light.mean(0).low, light.mean(0).high) == (0.0, 1.0)


def test_items_that_not_every_setting_has_are_left_out() -> None:
    pairs = Pairs(task(), [scored([1, 1, 1]), scored([0, 1])])
    assert pairs.ids == ["0", "1"] and pairs.mean(0).value == 1.0 and pairs.mean(1).value == 0.5


def test_intervals_are_the_same_each_time_and_of_their_own_for_each_task() -> None:
    scores = [scored(np.random.default_rng(3).random(30))]
    assert Pairs(task(), scores).mean(0) == Pairs(task(), scores).mean(0)
    assert Pairs(task(), scores).mean(0) != Pairs(task(name="other"), scores).mean(0)


def test_teacher_at_chance_gives_no_retention() -> None:
    found = Pairs(task(chance=0.5), [scored([1, 0]), scored([1, 1])]).retention(1)
    assert math.isnan(found.value)
    assert math.isnan(estimate(1.0, np.array([np.nan, np.inf])).low)
