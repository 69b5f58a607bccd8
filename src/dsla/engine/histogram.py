"""Counts of values by size, for whoever watches an engine over days."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


class Histogram:
    """Counts values between bounds; it takes the same memory however many there are.

    Args:
        bounds: upper bounds, rising; a value counts under the first one that it does not exceed, or above all of them.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def summary(self) -> dict[str, Any]:
        """`bounds`; `counts` under each of them and above all; the `sum` of the values."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}
