"""The load as a policy sees it: bytes, waiting prompts, recent latencies, and what a conversion would save whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

from dsla.engine.admission import LevelRules
from dsla.engine.arena import Arena
from dsla.engine.decoder import PackedDecoder
from dsla.engine.events import EventLog
from dsla.engine.pace import Pace
from dsla.engine.recent import Recent
from dsla.engine.request import Request
from dsla.engine.scheduler import Scheduler
from dsla.engine.signals import RequestSummary, Signals
from dsla.errors import EngineError

_SAMPLE = 64
"""Queued prompts whose time is predicted one by one; that of the others is taken to be alike, by their tokens."""

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Load:
    """Measures the load.

    Args:
        decoder: the model.
        arena: the memory.
        scheduler: the requests.
        rules: levels of new requests.
        pace: what steps cost.
        clock: seconds.
        log: counts latencies.
        start_level: level at which a request that waits would start now.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        arena: Arena,
        scheduler: Scheduler,
        rules: LevelRules,
        pace: Pace,
        clock: Callable[[], float],
        log: EventLog,
        start_level: Callable[[Request], int],
    ) -> None:
        self._decoder, self._arena, self._scheduler, self._rules = decoder, arena, scheduler, rules
        self._pace, self._clock, self._log = pace, clock, log
        self._start_level = start_level
        self._ttft, self._itl = Recent(), Recent()
        self._steered = -math.inf

    def steered(self, now: float) -> None:
        """Levels were changed for the sake of latencies: only those that begin later tell whether it was enough."""
        self._steered = now

    def token(self, request: Request, now: float) -> None:
        """A request has got its next token, at `now`; those of one step get theirs at the same time."""
        if request.last_token_at is None:
            seconds = max(now - request.accepted_at, 0.0)
            self._ttft.add(now, seconds)
            self._log.time("ttft", seconds)
            self._log.count_prompt(len(request.prompt), request.cached_tokens)
            request.first_token_at = now
        else:
            seconds = max(now - request.last_token_at, 0.0)
            self._itl.add(now, seconds)
            self._log.time("itl", seconds)
        request.last_token_at = now

    def finished(self, request: Request, tokens: int) -> None:
        """A request has come to its end, with so many tokens."""
        if request.first_token_at is None or request.last_token_at is None:
            raise EngineError(f"request {request.id!r} has ended without a token: this is a bug in dsla")
        self._log.time("e2e", max(request.last_token_at - request.accepted_at, 0.0))
        if tokens > 1:
            self._log.time("tpot", max(request.last_token_at - request.first_token_at, 0.0) / (tokens - 1))

    def latencies(self) -> dict[str, dict[str, float] | None]:
        """Quantiles of recent times to first token and from token to token, seconds; None where none was seen of late.

        May be called from any thread.
        """
        now = self._clock()
        return {"ttft_seconds": _quantiles(self._ttft, now), "itl_seconds": _quantiles(self._itl, now)}

    def signals(self) -> Signals:
        """The load now."""
        now = self._clock()
        since = min(self._steered, now)
        waiting_tokens, waiting_seconds = self._waiting()
        return Signals(
            budget_bytes=self._arena.budget_bytes,
            kv_bytes=self._arena.kv_bytes,
            state_bytes=self._arena.state_bytes,
            wanted_bytes=self._scheduler.wanted_units(self._scheduler.plan()) * self._arena.page_bytes,
            new_level=self._rules.new_level,
            max_level=len(self._decoder.order),
            cached_bytes=self._arena.kept_bytes,
            queue_length=len(self._scheduler.waiting),
            waiting_tokens=waiting_tokens,
            waiting_seconds=waiting_seconds,
            ttft_seconds=self._ttft.quantile(now, since=since),
            itl_seconds=self._itl.quantile(now, since=since),
            new_fast_level=self._rules.new_fast_level,
        )

    def summaries(self) -> list[RequestSummary]:
        """The running requests."""
        cost, running = self._pace.cost, self._scheduler.running.values()
        decoding = [request for request in running if request.pending == 1]
        alike = 0 if cost is None else sum(request.computed >= cost.break_even_keys for request in decoding)
        rows, converted_rows = max(len(decoding), 1), max(alike, 1)
        return [self._summary(request, rows, converted_rows) for request in running]

    def _waiting(self) -> tuple[int, float | None]:
        """Tokens of prompts that are to be read, and the seconds they take, None = unknown."""
        cost, opened = self._pace.cost, (*self._scheduler.running.values(), *self._scheduler.waiting)
        reading = [request for request in opened if request.prompt_left]
        if cost is None:
            return sum(request.prompt_left for request in reading), None
        seconds, tokens = 0.0, 0
        for request in islice(reading, _SAMPLE):
            level = request.level if request.levels else self._start_level(request)
            kept = self._decoder.n_layers - level
            seconds += cost.prompt_seconds(
                request.prompt_left, request.computed, kept, level, self._scheduler.max_step_tokens
            )
            tokens += request.prompt_left
        rest = sum(request.prompt_left for request in reading[_SAMPLE:])
        return tokens + rest, seconds * (1 + rest / tokens if tokens else 1) * self._pace.ratio

    def _summary(self, request: Request, rows: int, converted_rows: int) -> RequestSummary:
        prompt_pages, slot = self._arena.page_count(len(request.prompt)), self._arena.slot_units
        kept = self._decoder.n_layers - request.level
        page_bytes = self._arena.page_bytes
        saved_now = 0
        if request.computed and request.memory is not None and request.level < len(self._decoder.order):
            saved_now = request.memory.fold_gain(self._decoder.order[request.level])
        new_tokens = max(min(request.max_tokens - len(request.output), self._scheduler.reserve_tokens), 1)
        return RequestSummary(
            id=request.id,
            level=request.level,
            max_level=request.level if request.replaying else request.ceiling,
            computed_tokens=request.computed,
            saving_per_layer=saved_now * page_bytes,
            prompt_bytes=(kept * prompt_pages + request.level * slot) * page_bytes,
            prompt_saving_per_layer=(prompt_pages - slot) * page_bytes,
            prompt_tokens_left=request.prompt_left,
            new_tokens_left=new_tokens,
            **self._seconds(request, new_tokens, rows, converted_rows),
        )

    def _seconds(self, request: Request, new_tokens: int, rows: int, converted_rows: int) -> dict[str, float]:
        """What of a summary is told by the cost model; nothing without one."""
        cost, left, computed = self._pace.cost, request.prompt_left, request.computed
        if cost is None:
            return {}
        seconds = {
            "decode_saving_per_layer": cost.decode_saving_per_layer(computed, rows, converted_rows),
            "prefill_saving_per_layer": cost.prefill_saving_per_layer(left, computed),
            "fold_seconds_per_layer": cost.fold_seconds(computed),
            "full_seconds": cost.request_seconds(left, new_tokens, self._decoder.n_layers, computed, rows),
        }
        return {name: value * self._pace.ratio for name, value in seconds.items()}


def _quantiles(values: Recent, now: float) -> dict[str, float] | None:
    found = {name: values.quantile(now, share) for name, share in _QUANTILES.items()}
    return {name: value for name, value in found.items() if value is not None} or None
