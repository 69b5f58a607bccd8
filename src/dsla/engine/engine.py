"""The step loop: requests in, tokens out. One thread; `AsyncEngine` puts it behind an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsla.engine.admission import Admission, LevelRules
from dsla.engine.arena import Arena
from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.cost import CostModel, StepWork
from dsla.engine.decoder import PackedDecoder
from dsla.engine.events import Event, EventLog
from dsla.engine.intake import build_request, level_bounds
from dsla.engine.levels import LevelControl
from dsla.engine.load import Load
from dsla.engine.memory import RequestMemory
from dsla.engine.pace import Pace
from dsla.engine.prefix import PrefixCache
from dsla.engine.request import Request, Status, StepOutput
from dsla.engine.sampler import Choice, choose
from dsla.engine.sampling import SamplingParams
from dsla.engine.scheduler import Chunk, Scheduler
from dsla.engine.signals import Policy
from dsla.errors import BusyError, EngineError

FIRST_SNAPSHOT = 512
"""Tokens of a prompt after which states are kept for others for the first time; then after twice as many, and so on."""

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the engine.

    Attributes:
        max_step_tokens: tokens one step computes, at most; at least 2.
        max_step_seconds: time a step should take, at most; None = no bound. Half of it may go to conversions.
        max_waiting: requests that wait, at most; more are refused.
        max_running: requests that run at once, at most. Lowered to `max_step_tokens - 1`: each takes a token of every
            step, and prompts need some too.
        open_ended_tokens: `max_tokens` of requests that state none, at most.
        reserve_tokens: tokens to come that a running request is promised memory for, or all where they are fewer.
        cache_bytes: bytes kept for requests that begin as earlier ones did, at most; None = all that is free, 0 = none.
        park_bytes: host memory for what requests that must give way remember; those that find no room there compute it
            again.
        level: level of all requests, fixed; None = the policy decides (0 without one).
        max_events: events kept in the log.
    """

    max_step_tokens: int = 512
    max_step_seconds: float | None = None
    max_waiting: int = 4096
    max_running: int = 64
    open_ended_tokens: int = 1024
    reserve_tokens: int = 256
    cache_bytes: int | None = None
    park_bytes: int = 0
    level: int | None = None
    max_events: int = 1000

    def __post_init__(self) -> None:
        least = {
            "max_step_tokens": 2,
            "max_waiting": 1,
            "max_running": 1,
            "open_ended_tokens": 1,
            "reserve_tokens": 0,
            "cache_bytes": 0,
        }
        for name, low in {**least, "park_bytes": 0}.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise EngineError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if self.max_step_seconds is not None and not self.max_step_seconds > 0:
            raise EngineError(f"max_step_seconds must be positive, found {self.max_step_seconds}")
        object.__setattr__(self, "max_running", min(self.max_running, self.max_step_tokens - 1))


class Engine:
    """Serves requests at any levels from one set of weights and one memory budget.

    Args:
        decoder: the model.
        arena: memory made for it (`decoder.arena(budget)`).
        config: settings.
        policy: decides levels from the load, or None: `config.level` for all.
        clock: seconds, never going back.
        cost: what steps take on this machine; without it `config.max_step_seconds` bounds conversions only.

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
        cost: CostModel | None = None,
    ) -> None:
        self.decoder, self.arena, self.config = decoder, arena, config or EngineConfig()
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._outputs: list[StepOutput] = []
        self._arrivals = 0
        self._log = EventLog(self.config.max_events)
        self._pace = Pace(clock, self.config.max_step_seconds, cost)
        self._scheduler = Scheduler(
            arena, decoder.n_layers, self.config.max_running, self.config.max_step_tokens, self.config.reserve_tokens,
            self._pace,
        )  # fmt: skip
        self._cache = PrefixCache(arena, self.config.cache_bytes)
        rules = LevelRules(None, decoder.foldable)
        self._admission = Admission(decoder, arena, self._scheduler, self._cache, rules, self._pace, self._log)
        least = self._least_units()
        if least > arena.n_units:
            raise EngineError(
                f"the memory budget holds no request at all: give at least {least * arena.page_bytes:,} bytes, or allow "
                "another level"
            )
        wanted = self._admission.wanted
        self._load = Load(decoder, arena, self._scheduler, rules, self._pace, clock, self._log, wanted)
        self._levels = LevelControl(
            decoder, arena, self._scheduler, self._admission, rules, self._log, policy, self.config.level, self._fail,
            self._preempt, self._pace, self._load,
        )  # fmt: skip

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._requests or self._outputs)

    @property
    def parked_bytes(self) -> int:
        """Host memory that preempted requests take."""
        parked = [request.parked for request in list(self._requests.values())]
        return sum(memory.nbytes for memory in parked if memory is not None)

    def warm_up(self) -> None:
        """Computes a prompt and a token at the lowest and the highest level, as far as memory holds them.

        Whoever asks first then waits for nothing that happens once only. Nothing of it is counted or kept.
        """
        levels = {0, self._levels.max_level} if self.config.level is None else {self.config.level}
        for level in sorted(levels):
            memory = RequestMemory(self.arena, self.decoder.n_layers, self.decoder.order[:level])
            if memory.units_to_hold(_WARM_UP_TOKENS) > self.arena.unused_units:
                continue
            try:
                for known, count in ((0, _WARM_UP_TOKENS - 1), (_WARM_UP_TOKENS - 1, 1)):
                    memory.reserve(known + count)
                    segment = Segment(memory, [0] * count, known, True)
                    batch = PackedBatch([segment], self.decoder.device)
                    self.decoder.forward(batch, self.arena)
            finally:
                memory.release()

    def check_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        quality: str | None = None,
        max_level: int | None = None,
        min_level: int | None = None,
        sibling_of: str | None = None,
    ) -> Request:
        """Builds a request without adding it; may be called from any thread. Arguments and errors as `add_request`."""
        self.refuse_if_full()
        levels = level_bounds(quality, min_level, max_level, self._levels.max_level)
        request = build_request(
            prompt, params, request_id, levels, self.decoder, self.config.open_ended_tokens, self._worth_keeping
        )
        request.sibling_of = sibling_of
        needed = self._admission.smallest_claim(request)
        while params.max_tokens is None and needed > self.arena.n_units and request.max_tokens > 1:
            request.max_tokens = max(request.max_tokens - self.arena.page_tokens, 1)
            needed = self._admission.smallest_claim(request)
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
        sibling_of: str | None = None,
    ) -> str:
        """Accepts a request. An accepted request is run to its end unless it is cancelled.

        Args:
            prompt: token ids.
            params: sampling.
            request_id: its name. Default: a random one.
            quality: `full`, `balanced` or `fast`: how many layers may be converted.
            max_level: the same, as a level; not together with `quality`.
            min_level: level to start at, at least. Default: 0.
            sibling_of: id of an open request with the same prompt and level bounds; the prompt is computed once for both.

        Returns:
            Its id.

        Raises:
            RequestError: if an argument is wrong or the request exceeds the model's context.
            BusyError: if too many requests wait.
            EngineError: if the id is taken, or the memory budget could never hold the request.
        """
        request = self.check_request(
            prompt, params, request_id=request_id, quality=quality, max_level=max_level, min_level=min_level,
            sibling_of=sibling_of,
        )  # fmt: skip
        return self.submit(request)

    def refuse_if_full(self, reserved: int = 0) -> None:
        """Refuses a further request where the queue has no room beside `reserved` ones to come. May be called from any thread.

        Raises:
            BusyError: if too many requests wait.
        """
        if len(self._scheduler.waiting) + reserved >= self.config.max_waiting:
            raise BusyError(f"{self.config.max_waiting} requests wait already: try again later")

    def submit(self, request: Request) -> str:
        """Accepts a request that `check_request` built, however many wait.

        Raises:
            EngineError: if its id is taken, or it is no sibling of the open request it names.
        """
        if request.id in self._requests:
            raise EngineError(f"a request {request.id!r} is open already: choose another id")
        leader = self._requests.get(request.sibling_of) if request.sibling_of is not None else None
        if leader is not None and not request.is_like(leader):
            raise EngineError(
                f"request {request.id!r} is no sibling of {leader.id!r}: their prompts or level bounds differ"
            )
        self._arrivals += 1
        request.arrival, request.accepted_at = self._arrivals, self._clock()
        self._requests[request.id] = request
        self._scheduler.waiting.append(request)
        self._log.add(Event(self._clock(), "accept", request.id, "queued"))
        return request.id

    def cancel(self, request_id: str, why: str = "by hand") -> bool:
        """Ends a request and frees its memory at once; the next step reports it with `abort`.

        Args:
            request_id: the request.
            why: what the log says of it.

        Returns:
            Whether it was open.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._keep_ended(request)
        self._close(request, Event(self._clock(), "cancel", request.id, why))
        self._outputs.append(StepOutput.of(request, [], "abort"))
        return True

    def finish(self, request_id: str) -> bool:
        """Ends a request that has tokens and frees its memory at once, as an end token would; the next step reports `stop`.

        Returns:
            Whether it was open, with tokens.
        """
        request = self._requests.get(request_id)
        if request is None or not request.output:
            return False
        self._finish(request, "stop", len(request.output))
        self._outputs.append(StepOutput.of(request, [], "stop"))
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
        self._pace.begin()
        self._levels.decide(now)
        self._levels.convert(now)
        if self._admission.start(now):
            self._levels.decide(now)
            self._levels.convert(now)
        chunks = self._levels.relieve(self._scheduler.plan(), now)
        if chunks:
            self._compute(chunks, now)
        if not self._requests:
            # Nobody steps an idle engine: the calm begins here.
            self._levels.decide(self._clock())
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def open_ids(self) -> list[str]:
        """Names of the requests that wait or run, in the order they came. May be read from any thread."""
        return list(self._requests)

    def stats(self, events_after: int | None = 0, most_waiting: int | None = None) -> dict[str, Any]:
        """Memory, queue, levels, speed, latencies and events, as plain data; times in seconds, those of events as `now`.

        May be called from any thread; figures may then be of two neighbouring moments.

        Args:
            events_after: leave out so many events, the oldest of all that ever were: `event_count` of an earlier answer;
                None = leave out all.
            most_waiting: waiting requests in `requests`, at most, those that came first; None = all.
        """
        now = self._clock()
        requests = list(self._requests.values())
        running = [request for request in requests if request.status is Status.RUNNING]
        waiting = [request for request in requests if request.status is Status.WAITING]
        return {
            "weights_bytes": self.decoder.weights.nbytes,
            "adapter_bytes": self.decoder.adapter_nbytes,
            "layers": self.decoder.n_layers,
            "order": list(self.decoder.order),
            "budget_bytes": self.arena.budget_bytes,
            "kv_bytes": self.arena.kv_bytes,
            "state_bytes": self.arena.state_bytes,
            "window_bytes": self.arena.window_bytes,
            "free_bytes": self.arena.free_units * self.arena.page_bytes,
            "cached_bytes": self.arena.kept_bytes,
            "parked_bytes": self.parked_bytes,
            "snapshots": len(self._cache),
            "running": len(running),
            "waiting": len(waiting),
            "max_level": self._levels.max_level,
            "adaptive": self._levels.adaptive,
            "level": self._levels.forced,
            "new_level": self._levels.new_level if self._levels.forced is None else self._levels.forced,
            "requests": [
                {
                    "id": request.id,
                    "status": request.status.value,
                    "age_seconds": now - request.accepted_at,
                    "level": request.level,
                    "levels": [list(entry) for entry in request.levels],
                    "prompt_tokens": len(request.prompt),
                    "computed_tokens": request.computed,
                    "completion_tokens": len(request.output),
                    "cached_tokens": request.cached_tokens,
                    "max_tokens": request.max_tokens,
                    "converted": list(self.decoder.order[: request.level]),
                    "memory_bytes": self._memory_bytes(request),
                }
                for request in (*running, *waiting[:most_waiting])
            ],
            **self._load.latencies(),
            **self._log.summary(now, events_after),
        }

    def _memory_bytes(self, request: Request) -> int:
        """Bytes of the budget that a request holds; what it shares with others counts for each."""
        memory = request.memory
        return 0 if memory is None else memory.units * self.arena.page_bytes

    def _least_units(self) -> int:
        """Units that the shortest of all requests takes at a level it may have."""
        level, n_layers = self.config.level, self.decoder.n_layers
        levels = range(len(self.decoder.order) + 1) if level is None else [min(level, len(self.decoder.order))]
        return min(n_layers - level + level * self.arena.slot_units for level in levels)

    def _compute(self, chunks: list[Chunk], now: float) -> None:
        segments = []
        for chunk in chunks:
            request, memory = chunk.request, chunk.request.memory
            if memory is None:
                raise EngineError(f"request {request.id!r} is scheduled without memory: this is a bug in dsla")
            memory.reserve(request.computed + chunk.count)
            segments.append(Segment(memory, request.next_tokens(chunk.count), request.computed, chunk.sample))
        work, began = sum((chunk.work for chunk in chunks), StepWork()), self._clock()
        logits = self.decoder.forward(PackedBatch(segments, self.decoder.device), self.arena)
        prompt_tokens = sum(chunk.count for chunk in chunks if chunk.request.computed < len(chunk.request.prompt))
        sampled = [chunk.request for chunk in chunks if chunk.sample]
        for chunk in chunks:
            begun, chunk.request.computed = chunk.request.computed, chunk.request.computed + chunk.count
            self._keep_prefix(chunk.request, begun)
        for row, request in enumerate(list(sampled)):
            if not request.output:
                forked = self._admission.fork(request, now)
                sampled += forked
                logits = torch.cat([logits, logits[row].expand(len(forked), -1)]) if forked else logits
        self._sample(sampled, logits, now)
        self._pace.end(work, began)
        self._log.count_step(now, prompt_tokens, len(sampled))

    def _sample(self, requests: list[Request], logits: Tensor, now: float) -> None:
        """Chooses the next token of each request by its row of logits `[n, vocab]`."""
        choices = choose(logits, requests)
        ended = self._clock()
        for request, choice in zip(requests, choices, strict=True):
            if isinstance(choice, str):
                layer = request.memory.broken_layer(request.computed) if request.memory else None
                place = "" if layer is None else f"; what layer {layer} remembers is the first that is not finite"
                self._fail(
                    request,
                    f"request {request.id!r}: {choice} after {request.computed} tokens at level {request.level}{place}",
                    now,
                )
            else:
                self._append(request, choice, ended)

    def _keep_prefix(self, request: Request, begun: int) -> None:
        """Keeps what a request remembers for others: at the end of its prompt, and on the way at ends of messages and at
        doubling distances.

        States of short texts are not worth their bytes; and of any text without states, every beginning is kept with it.
        """
        computed, prompt = request.computed, len(request.prompt)
        memory = request.memory
        if memory is None or computed > prompt or request.replaying:
            return
        doubled = (begun // FIRST_SNAPSHOT).bit_length() < (computed // FIRST_SNAPSHOT).bit_length()
        wanted = computed == prompt or (request.level and (doubled or computed in request.message_ends))
        if not wanted or (request.level and computed < self._worth_keeping):
            return
        # What is kept at the end of the prompt is forgotten in this very step if the logits are not finite.
        if computed == prompt or self._is_sound(request):
            self._cache.add(request.prompt[:computed], request.levels, memory)

    @property
    def _worth_keeping(self) -> int:
        """Tokens from which on states take fewer bytes than pages would; none do where nothing is kept."""
        if self.config.cache_bytes == 0:
            return self.decoder.max_tokens + 1
        return self.arena.slot_units * self.arena.page_tokens + 1

    def _is_sound(self, request: Request) -> bool:
        """Whether all that a request remembers is finite: its latest logits have shown it, or it is looked at."""
        if request.output and request.computed > request.replay_until:
            return True
        return request.memory is None or request.memory.broken_layer(request.computed) is None

    def _keep_ended(self, request: Request) -> None:
        """Leaves what a request remembers to others, if it is sound."""
        if request.memory is None:
            return
        if self._is_sound(request):
            self._cache.add_ended(request.tokens[: request.computed], request.history, request.memory)
        else:
            request.memory.release()
        request.memory = None

    def _preempt(self, request: Request, now: float) -> None:
        """Sends a running request back to the queue; what it remembers is parked, or kept as long as nobody needs the room."""
        memory = request.memory
        if memory is None:
            raise EngineError(f"request {request.id!r} has no memory to give back: this is a bug in dsla")
        parks = self.parked_bytes + memory.units * self.arena.page_bytes <= self.config.park_bytes
        if parks:
            request.parked, request.memory = memory.park(), None
        else:
            self._keep_ended(request)
            request.forget_progress()
        self._scheduler.put_back(request)
        self._log.add(Event(now, "preempt", request.id, "parked" if parks else "to be replayed"))

    def _append(self, request: Request, choice: Choice, now: float) -> None:
        ends = choice.token in request.end_tokens
        tokens = [] if ends else [choice.token]
        logprobs = None if choice.logprobs is None else () if ends else (choice.logprobs,)
        request.output += tokens
        self._load.token(request, now)
        reason = "stop" if ends else "length" if len(request.output) == request.max_tokens else None
        if reason is not None:
            self._finish(request, reason, len(request.output) + ends)
        self._outputs.append(StepOutput.of(request, tokens, reason, logprobs=logprobs))

    def _finish(self, request: Request, reason: str, tokens: int) -> None:
        self._load.finished(request, tokens)
        self._keep_ended(request)
        self._close(request, Event(self._clock(), "finish", request.id, reason))

    def _fail(self, request: Request, message: str, now: float) -> None:
        self._cache.forget(np.array(request.tokens[: request.computed], dtype=np.int64))
        self._close(request, Event(now, "error", request.id, message))
        self._outputs.append(StepOutput.of(request, [], "error", message))

    def _close(self, request: Request, event: Event) -> None:
        self._scheduler.remove(request)
        if request.memory is not None:
            request.memory.release()
        request.memory = request.parked = None
        self._cache.trim()
        del self._requests[request.id]
        self._log.add(event)
