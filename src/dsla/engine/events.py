"""What the engine did and why, and how much of it."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from dsla.engine.histogram import Histogram

_WINDOW_SECONDS = 10.0
_MOST_STEPS = 10_000

_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TIMES: dict[str, tuple[float, ...]] = {
    "queue": _REQUEST,
    "ttft": (
        0.001,
        0.005,
        0.01,
        0.02,
        0.04,
        0.06,
        0.08,
        0.1,
        0.25,
        0.5,
        0.75,
        1,
        2.5,
        5,
        7.5,
        10,
        20,
        40,
        80,
        160,
        640,
        2560,
    ),
    "itl": _TOKEN,
    "tpot": _TOKEN,
    "e2e": _REQUEST,
    "fold": (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
}
"""What takes time, and the bounds it is counted between, seconds; those of requests and tokens are vLLM's.

`queue`: from acceptance to the first start; `ttft`: to the first token; `itl`: from one token to the next; `tpot`: the mean
of those over a request that has ended by itself, and `e2e` all its time; `fold`: converting one layer of one request.
"""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: seconds of the engine's clock.
        kind: `accept`, `start`, `level`, `defer`, `new-level`, `new-fast-level`, `force-level`, `preempt`, `finish`,
            `cancel` or `error`.
        request_id: the request, or None.
        reason: why; of a `cancel`: `client left`, `deadline`, `by hand` or `engine closed`.
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
        self._count = 0
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=_MOST_STEPS)
        self.conversions: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.preemptions: Counter[str] = Counter()
        self.steps = self.prompt_tokens = self.generated_tokens = 0
        self.asked_tokens = self.cached_tokens = 0
        self._times = {name: Histogram(bounds) for name, bounds in TIMES.items()}

    def add(self, event: Event) -> None:
        """Keeps an event; a rise of a running request's level counts as so many conversions."""
        with self._lock:
            self._events.append(event)
            self._count += 1
            if event.kind == "level" and event.to_level is not None and event.from_level is not None:
                self.conversions[event.reason] += event.to_level - event.from_level
            if event.kind == "preempt":
                self.preemptions[event.reason] += 1
            if event.kind in ("finish", "cancel", "error"):
                self.finished[event.reason if event.kind == "finish" else event.kind] += 1

    def time(self, name: str, seconds: float) -> None:
        """Counts what took so long; `name` is a key of `TIMES`."""
        with self._lock:
            self._times[name].add(seconds)

    def count_prompt(self, tokens: int, cached_tokens: int) -> None:
        """Counts the prompt of a request that got its first token, and how much of it others had computed."""
        with self._lock:
            self.asked_tokens += tokens
            self.cached_tokens += cached_tokens

    def count_step(self, start: float, prompt_tokens: int, generated_tokens: int) -> None:
        """Counts a step that began at `start`."""
        with self._lock:
            self.steps += 1
            self.prompt_tokens += prompt_tokens
            self.generated_tokens += generated_tokens
            self._steps.append((start, prompt_tokens, generated_tokens))
            self._forget(start)

    def summary(self, now: float, events_after: int | None = 0) -> dict[str, Any]:
        """Totals, rates over the last seconds, and the events, as plain data.

        Args:
            now: seconds.
            events_after: leave out so many events, the oldest of all that ever were; where there were not as many, the
                number is of another log, and none is left out. None = leave out all.
        """
        with self._lock:
            return self._summary(now, events_after)

    def _summary(self, now: float, events_after: int | None) -> dict[str, Any]:
        known = self._count if events_after is None else events_after if events_after <= self._count else 0
        known = max(known - (self._count - len(self._events)), 0)
        self._forget(now)
        seconds = max(now - self._steps[0][0], 1e-3) if self._steps else 1.0
        return {
            "now": now,
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens_per_second": sum(step[1] for step in self._steps) / seconds,
            "generated_tokens_per_second": sum(step[2] for step in self._steps) / seconds,
            "conversions": dict(self.conversions),
            "finished": dict(self.finished),
            "preemptions": dict(self.preemptions),
            "asked_tokens": self.asked_tokens,
            "cached_tokens": self.cached_tokens,
            "times": {name: times.summary() for name, times in self._times.items()},
            "event_count": self._count,
            "events": [asdict(event) for event in islice(self._events, known, None)],
        }

    def _forget(self, now: float) -> None:
        # Steps after now are from before the clock jumped back.
        while self._steps and not now - _WINDOW_SECONDS <= self._steps[0][0] <= now:
            self._steps.popleft()
