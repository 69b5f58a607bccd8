"""Latencies of replayed requests, and what they say of a server: percentiles, throughput, goodput under objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DONE, REJECTED, FAILED, CANCELLED = "done", "rejected", "failed", "cancelled"

_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Objectives:
    """What an answer must keep to count; None = anything does.

    Attributes:
        ttft: time to first token, seconds, at most.
        tpot: time per output token after the first, seconds, at most.
    """

    ttft: float | None = None
    tpot: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times are seconds since the run began.

    Attributes:
        status: `done`, `rejected` (429 or 503), `failed`, or `cancelled` (the run was stopped).
        prompt_tokens: length of its prompt.
        wanted_tokens: tokens it asked for.
        due: when the trace has it arrive.
        sent: when it was sent.
        ended: when its answer was whole, or it was given up.
        arrivals: when each piece of the answer came.
        output_tokens: tokens of the answer, as the server counts them; pieces where it does not.
        cached_tokens: tokens of the prompt that the server had computed before, where it says so.
        level: level it ended at, where the server says so.
        error: what went wrong.
    """

    status: str
    prompt_tokens: int
    wanted_tokens: int
    due: float
    sent: float
    ended: float
    arrivals: tuple[float, ...] = ()
    output_tokens: int = 0
    cached_tokens: int | None = None
    level: int | None = None
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token, from when it was due, seconds."""
        return self.arrivals[0] - self.due

    @property
    def e2e(self) -> float:
        """Time to the last token, from when it was due, seconds."""
        return self.arrivals[-1] - self.due

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, seconds; None where there is only one."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def normalised(self) -> float:
        """Time to the last token per output token, seconds."""
        return self.e2e / self.output_tokens

    @property
    def gaps(self) -> list[float]:
        """Times between pieces of the answer (inter-token latency), seconds."""
        return np.diff(self.arrivals).tolist()  # type: ignore[no-any-return]

    def meets(self, objectives: Objectives) -> bool:
        """Whether it was answered in time."""
        return (
            self.status == DONE
            and (objectives.ttft is None or self.ttft <= objectives.ttft)
            and (objectives.tpot is None or self.tpot is None or self.tpot <= objectives.tpot)
        )

    def record(self) -> dict[str, Any]:
        """All of it as plain data, with the gaps between pieces in place of their times."""
        data = {name: value for name, value in asdict(self).items() if name != "arrivals" and value is not None}
        if self.status == DONE:
            data |= {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e, "normalised": self.normalised}
            data["itl"] = self.gaps
        return data


def span(outcomes: Sequence[Outcome]) -> float:
    """Seconds from the first arrival to the last answer of a run."""
    return max(max(outcome.ended for outcome in outcomes) - min(outcome.due for outcome in outcomes), 1e-9)


def summary(outcomes: Sequence[Outcome], objectives: Objectives, seconds: float | None = None) -> dict[str, Any]:
    """What a run says of a server.

    Args:
        outcomes: of all requests of the run, at least one.
        objectives: what goodput counts.
        seconds: the time of all runs, where outcomes are of several. Default: their `span`.

    Returns:
        Counts by status, `met` (requests within the objectives), `seconds` from the first arrival to the last answer, rates
        over those seconds (`goodput` is `met` a second), and mean and percentiles of the latencies, None without an answer.
    """
    done = [outcome for outcome in outcomes if outcome.status == DONE]
    seconds = span(outcomes) if seconds is None else seconds
    met = sum(outcome.meets(objectives) for outcome in outcomes)
    tokens = sum(outcome.output_tokens for outcome in done)
    levels = [outcome.level for outcome in done if outcome.level is not None]
    cached = [outcome.cached_tokens for outcome in done if outcome.cached_tokens is not None]
    return {
        "requests": len(outcomes),
        **{status: sum(one.status == status for one in outcomes) for status in (DONE, REJECTED, FAILED, CANCELLED)},
        "short": sum(outcome.output_tokens < outcome.wanted_tokens for outcome in done),
        "met": met,
        "met_share": met / len(outcomes),
        "seconds": seconds,
        "goodput": met / seconds,
        "requests_per_second": len(done) / seconds,
        "output_tokens_per_second": tokens / seconds,
        "prompt_tokens_per_second": sum(outcome.prompt_tokens for outcome in done) / seconds,
        "cached_share": sum(cached) / sum(outcome.prompt_tokens for outcome in done) if cached else None,
        "mean_level": sum(levels) / len(levels) if levels else None,
        "client_lag": max(outcome.sent - outcome.due for outcome in outcomes),
        "ttft": _spread(outcome.ttft for outcome in done),
        "tpot": _spread(outcome.tpot for outcome in done if outcome.tpot is not None),
        "itl": _spread(gap for outcome in done for gap in outcome.gaps),
        "e2e": _spread(outcome.e2e for outcome in done),
        "normalised": _spread(outcome.normalised for outcome in done),
    }


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    known = list(values)
    if not known:
        return None
    high = np.percentile(known, _PERCENTILES).tolist()
    return {
        "mean": math.fsum(known) / len(known),
        **{f"p{p}": value for p, value in zip(_PERCENTILES, high, strict=True)},
    }
