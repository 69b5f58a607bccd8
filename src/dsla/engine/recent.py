"""Latencies of the last seconds."""

from __future__ import annotations

import math
from collections import deque


class Recent:
    """Values with their times, and a quantile of those that are not too old.

    Args:
        window_seconds: how long a value counts.
        size: values kept, at most: the latest ones.
    """

    def __init__(self, window_seconds: float = 10.0, size: int = 256) -> None:
        self._window = window_seconds
        self._values: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, now: float, value: float) -> None:
        """Adds a value seen at `now` (seconds)."""
        self._values.append((now, value))

    def quantile(self, now: float, share: float = 0.9) -> float | None:
        """The least value that a `share` of those in the window do not exceed; None if there is none.

        Values from a time after `now`, which a clock that jumped back has left, do not count. May be called from any thread.
        """
        values = sorted(value for time, value in tuple(self._values) if now - self._window <= time <= now)
        return values[max(math.ceil(share * len(values)), 1) - 1] if values else None
