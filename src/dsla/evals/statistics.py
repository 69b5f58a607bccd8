"""What scores of items say of a level: means, what is left of the teacher, and how sure that is. Plain arithmetic.

Intervals are percentiles over bootstrap samples of the items (Efron 1979). Both levels of a comparison are sampled together,
item by item, so what they share (hard items, long ones) does not widen them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsla.evals.task import Item, Task

SAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether `value` is outside of the interval."""
        return value < self.low or value > self.high


def estimate(value: float, sampled: np.ndarray) -> Estimate:
    """A figure with the interval its bootstrap samples `[SAMPLES]` give; those that are not finite do not count."""
    finite = sampled[np.isfinite(sampled)]
    if not finite.size:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(finite, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(value, float(low), float(high))


class Pairs:
    """Scores of one task at some settings, item by item, and their bootstrap samples.

    Args:
        task: whose; the seed follows from its name.
        items: of each setting; the items that all of them have count.
    """

    def __init__(self, task: Task, items: Sequence[dict[str, Item]]) -> None:
        self.task = task
        self.ids = [key for key in items[0] if all(key in other for other in items)]
        self._scores = np.array([[one[key].score for key in self.ids] for one in items])
        self._weights = np.array([[one[key].weight for key in self.ids] for one in items])
        count = len(self.ids)
        draw = np.random.default_rng(zlib.crc32(task.name.encode()))
        counts = draw.multinomial(count, np.full(count, 1 / count), SAMPLES).astype(float)
        self.means = (self._scores * self._weights).sum(1) / self._weights.sum(1)
        self.sampled = ((self._scores * self._weights) @ counts.T) / (self._weights @ counts.T)

    def mean(self, at: int) -> Estimate:
        """Mean score of a setting; of `nll` the perplexity."""
        if self.task.metric == "nll":
            return estimate(float(np.exp(self.means[at])), np.exp(self.sampled[at]))
        return estimate(float(self.means[at]), self.sampled[at])

    def difference(self, at: int, other: int) -> Estimate:
        """Mean score of one setting less another's."""
        return estimate(float(self.means[at] - self.means[other]), self.sampled[at] - self.sampled[other])

    def ratio(self, at: int, teacher: int = 0) -> Estimate:
        """Perplexity of a setting over the teacher's."""
        return estimate(
            float(np.exp(self.means[at] - self.means[teacher])), np.exp(self.sampled[at] - self.sampled[teacher])
        )

    def retention(self, at: int, teacher: int = 0) -> Estimate:
        """(score - chance) / (teacher's score - chance)."""
        return retention([self], at, teacher)

    def above_chance(self, at: int) -> Estimate:
        """Mean score less chance."""
        return estimate(float(self.means[at] - self.task.chance), self.sampled[at] - self.task.chance)


def retention(tasks: Sequence[Pairs], at: int, teacher: int = 0) -> Estimate:
    """sum(score - chance) / sum(teacher's score - chance) over tasks whose items are sampled each for itself.

    Args:
        tasks: one or more, at the same settings.
        at: the setting.
        teacher: the setting it is compared with.
    """
    chance = sum(pairs.task.chance for pairs in tasks)
    left, whole = (sum(float(pairs.means[i]) for pairs in tasks) - chance for i in (at, teacher))
    sampled_left, sampled_whole = (np.sum([pairs.sampled[i] for pairs in tasks], 0) - chance for i in (at, teacher))
    with np.errstate(divide="ignore", invalid="ignore"):
        return estimate(left / whole if whole else float("nan"), sampled_left / sampled_whole)
