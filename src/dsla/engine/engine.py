"""The step loop: requests in, tokens out. One thread; `AsyncEngine` puts it behind an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsla.engine.arena import Arena
from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.decoder import PackedDecoder
from dsla.engine.events import Event, EventLog
from dsla.engine.intake import build_request, level_bounds
from dsla.engine.levels import LevelControl
from dsla.engine.request import Request, Status, StepOutput
from dsla.engine.sampling import SamplingParams, sample
from dsla.engine.scheduler import Chunk, Scheduler
from dsla.engine.signals import Policy
from dsla.errors import EngineError


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the engine.

    Attributes:
        max_step_tokens: tokens one step computes, at most; at least 2.
        max_running: requests that run at once, at most. Lowered to `max_step_tokens - 1`: each takes a token of every
            step, and prompts need some too.
        open_ended_tokens: `max_tokens` of requests that state none, at most.
        level: level of all requests, fixed; None = the policy decides (0 without one).
        max_events: events kept in the log.
    """

    max_step_tokens: int = 512
    max_running: int = 64
    open_ended_tokens: int = 1024
    level: int | None = None
    max_events: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("max_step_tokens", 2), ("max_running", 1), ("open_ended_tokens", 1)):
            if getattr(self, name) < least:
                raise EngineError(f"{name} must be at least {least}, found {getattr(self, name)}")
        object.__setattr__(self, "max_running", min(self.max_running, self.max_step_tokens - 1))


class Engine:
    """Serves requests at any levels from one set of weights and one memory budget.

    Args:
        decoder: the model.
        arena: memory made for it (`decoder.arena(budget)`).
        config: settings.
        policy: decides levels from the load, or None: `config.level` for all.
        clock: seconds, never going back.

    Raises:
        EngineError: if the level is out of range.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        arena: Arena,
        config: EngineConfig | None = None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.arena, self.config = decoder, arena, config or EngineConfig()
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._outputs: list[StepOutput] = []
        self._log = EventLog(self.config.max_events)
        self._scheduler = Scheduler(arena, decoder.n_layers, self.config.max_running, self.config.max_step_tokens)
        self._levels = LevelControl(decoder, arena, self._scheduler, self._log, policy, self.config.level, self._fail)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._requests or self._outputs)

    def check_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        quality: str | None = None,
        max_level: int | None = None,
        min_level: int | None = None,
    ) -> Request:
        """Builds a request without adding it; may be called from any thread. Arguments and errors as `add_request`."""
        levels = level_bounds(quality, min_level, max_level, self._levels.max_level)
        request = build_request(prompt, params, request_id, levels, self.decoder, self.config.open_ended_tokens)
        needed = self._levels.smallest_claim(request)
        while params.max_tokens is None and needed > self.arena.n_units and request.max_tokens > 1:
            request.max_tokens = max(request.max_tokens - self.arena.page_tokens, 1)
            needed = self._levels.smallest_claim(request)
        if needed > self.arena.n_units:
            raise EngineError(
                f"a request of {len(prompt)} prompt tokens and up to {request.max_tokens} new ones, at levels "
                f"{levels[0]} to {levels[1]}, needs {needed * self.arena.page_bytes:,} bytes; the memory budget is "
                f"{self.arena.budget_bytes:,}: raise it to at least that, shorten the request, or allow a higher level"
            )
        return request

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        quality: str | None = None,
        max_level: int | None = None,
        min_level: int | None = None,
    ) -> str:
        """Accepts a request. An accepted request is run to its end unless it is cancelled.

        Args:
            prompt: token ids.
            params: sampling.
            request_id: its name. Default: a random one.
            quality: `full`, `balanced` or `fast`: how many layers may be converted.
            max_level: the same, as a level; not together with `quality`.
            min_level: level to start at, at least. Default: 0.

        Returns:
            Its id.

        Raises:
            RequestError: if an argument is wrong or the request exceeds the model's context.
            EngineError: if the id is taken, or the memory budget could never hold the request.
        """
        request = self.check_request(
            prompt, params, request_id=request_id, quality=quality, max_level=max_level, min_level=min_level
        )
        return self.submit(request)

    def submit(self, request: Request) -> str:
        """Accepts a request that `check_request` built.

        Raises:
            EngineError: if its id is taken.
        """
        if request.id in self._requests:
            raise EngineError(f"a request {request.id!r} is open already: choose another id")
        self._requests[request.id] = request
        self._scheduler.waiting.append(request)
        self._log.add(Event(self._clock(), "accept", request.id, "queued"))
        return request.id

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its memory at once; the next step reports it with `abort`.

        Returns:
            Whether it was open.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._close(request, Event(self._clock(), "cancel", request.id, "cancelled"))
        self._outputs.append(StepOutput.of(request, [], "abort"))
        return True

    def check_level(self, level: int | None) -> None:
        """Checks what `set_level` would be given, from any thread; errors as `set_level`."""
        self._levels.check(level)

    def set_level(self, level: int | None) -> None:
        """Fixes the level from the next step on, within the bounds of each request.

        Running requests rise to it (they never fall), new ones start at it.

        Args:
            level: the level, or None to leave it to the policy again.

        Raises:
            EngineError: if there is no such level, or no policy to return to.
        """
        self._levels.force(level, self._clock())

    def step(self) -> list[StepOutput]:
        """Changes levels, starts requests, computes one packed batch, chooses tokens.

        Returns:
            One output per request that got tokens or ended.
        """
        now = self._clock()
        self._levels.apply_forced(now)
        self._levels.apply_policy(now)
        if self._levels.start(now):
            self._levels.apply_policy(now)
        chunks = self._scheduler.plan()
        self._levels.relieve(chunks, now)
        chunks = [chunk for chunk in chunks if chunk.request.status is Status.RUNNING]
        if chunks:
            self._compute(chunks, now)
        if not self._requests:
            # Nobody steps an idle engine: the calm begins here.
            self._levels.apply_policy(self._clock())
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> dict[str, Any]:
        """Memory, queue, levels, speed and events, as plain data.

        May be called from any thread; figures may then be of two neighbouring moments.
        """
        now = self._clock()
        requests = list(self._requests.values())
        return {
            "budget_bytes": self.arena.budget_bytes,
            "kv_bytes": self.arena.kv_bytes,
            "state_bytes": self.arena.state_bytes,
            "free_bytes": self.arena.free_units * self.arena.page_bytes,
            "running": sum(request.status is Status.RUNNING for request in requests),
            "waiting": sum(request.status is Status.WAITING for request in requests),
            "max_level": self._levels.max_level,
            "level": self._levels.forced,
            "new_level": self._levels.new_level if self._levels.forced is None else self._levels.forced,
            "requests": [
                {
                    "id": request.id,
                    "status": request.status.value,
                    "level": request.level,
                    "levels": [list(entry) for entry in request.levels],
                    "prompt_tokens": len(request.prompt),
                    "computed_tokens": request.computed,
                    "completion_tokens": len(request.output),
                }
                for request in requests
            ],
            **self._log.summary(now),
        }

    def _compute(self, chunks: list[Chunk], now: float) -> None:
        segments = []
        for chunk in chunks:
            request, memory = chunk.request, chunk.request.memory
            if memory is None:
                raise EngineError(f"request {request.id!r} is scheduled without memory: this is a bug in dsla")
            memory.reserve(request.computed + chunk.count)
            segments.append(Segment(memory, request.next_tokens(chunk.count), request.computed, chunk.sample))
        logits = self.decoder.forward(PackedBatch(segments, self.arena.page_tokens, self.decoder.device), self.arena)
        finite = torch.isfinite(logits).all(-1).tolist()
        greedy = logits.argmax(-1).tolist() if logits.shape[0] else []
        prompt_tokens = sum(chunk.count for chunk in chunks if chunk.request.computed < len(chunk.request.prompt))
        sampled = [chunk.request for chunk in chunks if chunk.sample]
        for chunk in chunks:
            chunk.request.computed += chunk.count
        for row, request in enumerate(sampled):
            if not finite[row]:
                place = f"after {request.computed} tokens at level {request.level}"
                self._fail(request, f"request {request.id!r}: logits are not finite {place}", now)
                continue
            params = request.params
            token = (
                sample(logits[row], params, request.seed, len(request.output)) if params.temperature else greedy[row]
            )
            self._append(request, token)
        self._log.count_step(now, prompt_tokens, len(sampled))

    def _append(self, request: Request, token: int) -> None:
        params = request.params
        ends = token in params.stop_token_ids or (not params.ignore_eos and token in self.decoder.eos_token_ids)
        if not ends:
            request.output.append(token)
        reason = "stop" if ends else "length" if len(request.output) == request.max_tokens else None
        if reason is not None:
            self._close(request, Event(self._clock(), "finish", request.id, reason))
        self._outputs.append(StepOutput.of(request, [] if ends else [token], reason))

    def _fail(self, request: Request, message: str, now: float) -> None:
        self._close(request, Event(now, "error", request.id, message))
        self._outputs.append(StepOutput.of(request, [], "error", message))

    def _close(self, request: Request, event: Event) -> None:
        self._scheduler.remove(request)
        del self._requests[request.id]
        self._log.add(event)
