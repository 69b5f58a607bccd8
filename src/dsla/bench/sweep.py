"""Replays traces at several rates, and what is kept of that: the record that plots and comparisons read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from dsla.bench.goodput import Objectives, Outcome, summary
from dsla.bench.records import origin
from dsla.bench.replay import Server, replay
from dsla.bench.trace import Workload
from dsla.errors import ConfigError, DataError

_KIND = "dsla bench serve"
_SAME = ("seed", "length_scale", "requests", "limits", "objectives", "vocabulary")
_RATE_STEPS = 1_000_000


@dataclass(frozen=True)
class Rate:
    """A mean arrival rate: requests a second, or `times` the trace's own."""

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Rate:
        """`0.5` is half a request a second, `0.5x` half of the trace's own rate.

        Raises:
            ConfigError: it is neither.
        """
        number = text.strip().removesuffix("x")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ConfigError(
                f"--rates: expected requests a second as 0.5, or times the trace's own as 2x, found {text!r}"
            )
        return cls(value, text.strip().endswith("x"))

    def of(self, workload: Workload) -> float:
        """Requests a second.

        Raises:
            ConfigError: all requests come at once, or it is relative and there is only one.
        """
        if math.isinf(workload.rate) and (self.relative or len(workload.requests) > 1):
            raise ConfigError("the requests all come at once, which has no rate to scale: take more with --requests")
        return self.value * workload.rate if self.relative else self.value


@dataclass(frozen=True)
class Setting:
    """How traces are replayed.

    Attributes:
        rates: mean arrival rates.
        objectives: what goodput counts.
        seed: of the prompts.
        vocabulary: token ids of prompts are below it.
        timeout: seconds an answer may take.
        length_scale: factor for all lengths.
        requests: requests of each trace, at most; None = all.
        limits: longest prompt, output, and both together, tokens; None = any.
    """

    rates: tuple[Rate, ...]
    objectives: Objectives = Objectives()
    seed: int = 0
    vocabulary: int = 32_000
    timeout: float = 600.0
    length_scale: float = 1.0
    requests: int | None = None
    limits: tuple[int | None, int | None, int | None] = (None, None, None)


@dataclass
class Run:
    """One trace at one rate.

    Attributes:
        trace: its name.
        rate: mean arrivals a second.
        workload: what is sent.
        outcomes: what became of it, so far.
    """

    trace: str
    rate: float
    workload: Workload
    outcomes: list[Outcome]


def plan(workloads: dict[str, Workload], rates: Sequence[Rate]) -> list[Run]:
    """All runs, trace by trace and rate by rate.

    Raises:
        ConfigError: a trace has no rate.
    """
    return [
        Run(name, rate.of(workload), workload.at_rate(rate.of(workload)), [])
        for name, workload in workloads.items()
        for rate in rates
    ]


async def sweep(server: Server, runs: Sequence[Run], setting: Setting, on_end: Callable[[int, Run, int], None]) -> None:
    """Replays all runs, one after the other; what has happened stays in them where it is cancelled.

    Args:
        server: whom to ask.
        runs: by `plan`.
        setting: how.
        on_end: called as each request ends with the place of its run, the run, and how many are open.
    """
    for place, run in enumerate(runs):

        def ended(open_requests: int, place: int = place, run: Run = run) -> None:
            on_end(place, run, open_requests)

        # No run finds prompts of an earlier one in the server's cache.
        seed = (setting.seed, crc32(run.trace.encode()), round(run.rate * _RATE_STEPS))
        requests = run.workload.requests
        await replay(server, requests, seed, setting.vocabulary, setting.timeout, run.outcomes, ended)


def record(server: Server, runs: Sequence[Run], setting: Setting) -> dict[str, Any]:
    """A sweep as plain data; runs that have not begun are left out."""
    settings = {name: value for name, value in asdict(setting).items() if name != "rates"}
    return {
        "kind": _KIND,
        **origin(),
        "server": {"url": server.url, "model": server.model, "max_tokens": server.max_tokens, "fields": server.extras},
        "settings": settings | {"limits": list(setting.limits)},
        "runs": [
            {
                "trace": run.trace,
                "rate": run.rate,
                "dropped": run.workload.dropped,
                "unsent": len(run.workload.requests) - len(run.outcomes),
                "summary": summary(run.outcomes, setting.objectives),
                "requests": [outcome.record() for outcome in run.outcomes],
            }
            for run in runs
            if run.outcomes
        ],
    }


def read_record(path: Path) -> dict[str, Any]:
    """A record that was written as JSON.

    Raises:
        DataError: it is not there or no such record.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise DataError(f"{path} is no record of `{_KIND}`")
    return data


def matched(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs of the same trace at the same rate in two records.

    Raises:
        ConfigError: the records were made with other settings, or have no run in common.
    """
    for name in _SAME:
        mine, theirs = first["settings"][name], second["settings"][name]
        if mine != theirs:
            raise ConfigError(f"the records do not compare: {name} is {mine} in one and {theirs} in the other")
    others = {(run["trace"], round(run["rate"], 9)): run for run in second["runs"]}
    pairs = [(run, others.get((run["trace"], round(run["rate"], 9)))) for run in first["runs"]]
    found = [(mine, theirs) for mine, theirs in pairs if theirs is not None]
    if not found:
        raise ConfigError("the records do not compare: no trace was replayed at the same rate in both")
    return found
