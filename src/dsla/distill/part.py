"""A conversion in parts: how long one call may take, and when what it did is written down."""

from __future__ import annotations

import math
import time

from dsla.distill import parallel


class TimeUp(Exception):
    """The time of a call is over and all it did is on disk; the message says how far it came. Not an error."""


class Part:
    """One call of a conversion that may be cut into several.

    A call ends only after it has written something new, so that any number of them, however short, gets to the end.

    Args:
        minutes: time it may take, from now. It takes longer by what must be done before anything can be written.
        checkpoint_seconds: seconds between checkpoints.
    """

    def __init__(self, minutes: float = math.inf, checkpoint_seconds: float = 60.0) -> None:
        self.minutes = minutes
        self._checkpoint_seconds = checkpoint_seconds
        self._end = time.monotonic() + 60 * minutes
        self._kept_at = time.monotonic()

    def due(self) -> bool:
        """Whether what was done should be written down now; processes that train together agree on it."""
        now = time.monotonic()
        return parallel.agreed(now >= self._end or now - self._kept_at > self._checkpoint_seconds)

    def kept(self, where: str) -> None:
        """To be called when something new is on disk.

        Args:
            where: how far the call has come, in words.

        Raises:
            TimeUp: if its time is over.
        """
        self._kept_at = time.monotonic()
        if parallel.agreed(self._kept_at >= self._end):
            raise TimeUp(where)
