"""What the engine did and why, and how much of it."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

_WINDOW_SECONDS = 10.0
_MOST_STEPS = 10_000


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: seconds of the engine's clock.
        kind: `accept`, `start`, `level`, `defer`, `new-level`, `force-level`, `finish`, `cancel` or `error`.
        request_id: the request, or None.
        reason: why.
        from_level: level before, where a level changed.
        to_level: level after.
        from_token: tokens computed when it changed.
        freed_bytes: bytes it freed; negative where it took some.
    """

    time: float
    kind: str
    request_id: str | None
    reason: str
    from_level: int | None = None
    to_level: int | None = None
    from_token: int | None = None
    freed_bytes: int = 0


class EventLog:
    """The latest events and running totals; written by the engine's thread, read from any.

    Args:
        size: events kept.
    """

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=size)
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=_MOST_STEPS)
        self.conversions: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.steps = self.prompt_tokens = self.generated_tokens = 0

    def add(self, event: Event) -> None:
        """Keeps an event; a rise of a running request's level counts as so many conversions."""
        with self._lock:
            self._events.append(event)
            if event.kind == "level" and event.to_level is not None and event.from_level is not None:
                self.conversions[event.reason] += event.to_level - event.from_level
            if event.kind in ("finish", "cancel", "error"):
                self.finished[event.reason if event.kind == "finish" else event.kind] += 1

    def count_step(self, start: float, prompt_tokens: int, generated_tokens: int) -> None:
        """Counts a step that began at `start`."""
        with self._lock:
            self.steps += 1
            self.prompt_tokens += prompt_tokens
            self.generated_tokens += generated_tokens
            self._steps.append((start, prompt_tokens, generated_tokens))
            self._forget(start)

    def summary(self, now: float) -> dict[str, Any]:
        """Totals, rates over the last seconds, and the events, as plain data."""
        with self._lock:
            return self._summary(now)

    def _summary(self, now: float) -> dict[str, Any]:
        self._forget(now)
        seconds = max(now - self._steps[0][0], 1e-3) if self._steps else 1.0
        return {
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens_per_second": sum(step[1] for step in self._steps) / seconds,
            "generated_tokens_per_second": sum(step[2] for step in self._steps) / seconds,
            "conversions": dict(self.conversions),
            "finished": dict(self.finished),
            "events": [asdict(event) for event in self._events],
        }

    def _forget(self, now: float) -> None:
        # Steps after now are from before the clock jumped back.
        while self._steps and not now - _WINDOW_SECONDS <= self._steps[0][0] <= now:
            self._steps.popleft()
