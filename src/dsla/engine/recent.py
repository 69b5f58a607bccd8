"""Latencies of the last seconds."""

from __future__ import annotations

import math
from collections import deque


class Recent:
    """Latencies with the times they were seen at, and a quantile of those that are not too old.

    Args:
        window_seconds: how long a latency counts.
        size: kept, at most: the latest ones. Equal ones of one moment, as those of all requests that decode together, are one.
    """

    def __init__(self, window_seconds: float = 10.0, size: int = 512) -> None:
        self._window = window_seconds
        self._values: deque[tuple[float, float, int]] = deque(maxlen=size)

    def add(self, now: float, value: float) -> None:
        """Adds a latency of `value` seconds that ended at `now` (seconds)."""
        count = 1
        if self._values and self._values[-1][:2] == (now, value):
            count += self._values.pop()[2]
        self._values.append((now, value, count))

    def quantile(self, now: float, share: float = 0.9, since: float = -math.inf) -> float | None:
        """The least latency that a `share` of those in the window do not exceed; None if there is none.

        Those that ended after `now`, which a clock that jumped back has left, do not count. May be called from any thread.

        Args:
            now: seconds.
            share: in [0, 1].
            since: only those that began later count.
        """
        held = tuple(self._values)
        found = sorted((v, n) for time, v, n in held if now - self._window <= time <= now and time - v > since)
        rank, below = max(math.ceil(share * sum(count for _, count in found)), 1), 0
        for value, count in found:
            below += count
            if below >= rank:
                return value
        return None
