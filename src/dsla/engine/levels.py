"""Levels at a step boundary: where requests start, and which ones rise by hand, by policy, or for lack of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsla.engine.arena import Arena
from dsla.engine.decoder import PackedDecoder
from dsla.engine.events import Event, EventLog
from dsla.engine.memory import RequestMemory
from dsla.engine.request import Request, Status
from dsla.engine.scheduler import Chunk, Scheduler
from dsla.engine.signals import Policy, RequestSummary, Signals
from dsla.errors import EngineError


class LevelControl:
    """Decides and carries out every change of level.

    Args:
        decoder: the model.
        arena: the memory.
        scheduler: the requests.
        log: where events go.
        policy: decides where no level is forced; None = a level is always forced.
        level: forced level, or None.
        fail: called with a request whose states are broken and a message; it must remove the request.

    Attributes:
        forced: level set by hand, or None.
        new_level: level new requests start at under the policy.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        arena: Arena,
        scheduler: Scheduler,
        log: EventLog,
        policy: Policy | None,
        level: int | None,
        fail: Callable[[Request, str, float], None],
    ) -> None:
        self._decoder, self._arena, self._scheduler, self._log = decoder, arena, scheduler, log
        self._policy, self._fail = policy, fail
        self._policy_state: Any = None
        self._deferred: set[str] = set()
        self.max_level = len(decoder.order)
        self.forced: int | None = None
        self.new_level = 0
        self.force(0 if level is None and policy is None else level, None)

    def force(self, level: int | None, now: float | None) -> None:
        """Fixes the level of all requests from the next step on, or (None) leaves it to the policy again.

        Raises:
            EngineError: if there is no such level, or no policy to return to.
        """
        self.check(level)
        self.forced = level
        self.new_level = 0
        self._policy_state = None
        self._deferred.clear()
        if level is None and self._decoder.foldable:
            for request in self._scheduler.running.values():
                request.ceiling = max(request.ceiling, request.max_level)
        if now is not None:
            self._log.add(Event(now, "force-level", None, "adaptive" if level is None else "by hand", to_level=level))

    def check(self, level: int | None) -> None:
        """Checks that `level` can be forced; errors as `force`."""
        if level is None and self._policy is None:
            raise EngineError("this engine has no policy to return to: give a level")
        if level is not None and not 0 <= level <= self.max_level:
            raise EngineError(f"level {level} is out of range: this model has levels 0 to {self.max_level}")

    def smallest_claim(self, request: Request) -> int:
        """The fewest units `request` can be run with under the present settings."""
        starts = self._starts(request)
        return min(self._scheduler.claim(request, *start) for start in (starts if self.forced is None else starts[:1]))

    def start(self, now: float) -> bool:
        """Starts waiting requests, in order, as long as their claims fit; whether there were any."""
        started = False
        while (request := self._scheduler.head()) is not None:
            # The settings may be others than those it was accepted under, and what they ask for more than there is.
            claims = ((self._scheduler.claim(request, *start), *start) for start in self._starts(request))
            claim, level, ceiling = next(found for found in claims if found[0] <= self._arena.n_units)
            if claim > self._scheduler.room(request):
                break
            request.ceiling = ceiling
            request.enter_level(level)
            request.memory = RequestMemory(self._arena, self._decoder.n_layers, self._decoder.order[:level])
            self._scheduler.start_head()
            self._log.add(Event(now, "start", request.id, "admitted", to_level=level))
            started = True
        return started

    def apply_forced(self, now: float) -> None:
        """Raises running requests towards the forced level, as far as memory lets it."""
        if self.forced is None:
            return
        for request in list(self._scheduler.running.values()):
            wanted = min(self.forced, request.max_level)
            level = self._affordable(request, wanted)
            if level > request.level:
                self._raise(request, level, "by hand", now)
            if level < wanted and request.id not in self._deferred and request.status is Status.RUNNING:
                self._deferred.add(request.id)
                reason = "no memory for states" if self._decoder.foldable else "adapter not foldable"
                self._log.add(Event(now, "defer", request.id, reason, from_level=level, to_level=wanted))

    def apply_policy(self, now: float) -> None:
        """Asks the policy and carries out what it decides."""
        if self._policy is None or self.forced is not None:
            return
        summaries = [self._summary(request) for request in self._scheduler.running.values()]
        self._policy_state, decisions = self._policy(self._policy_state, self.signals(), summaries, now)
        for decision in decisions:
            if decision.request_id is None:
                level = min(max(decision.level, 0), self.max_level)
                if level != self.new_level:
                    self._log.add(
                        Event(now, "new-level", None, decision.reason, from_level=self.new_level, to_level=level)
                    )
                self.new_level = level
                continue
            request = self._scheduler.running.get(decision.request_id)
            if request is not None and self._scheduler.converts_profitably(request):
                level = min(decision.level, request.ceiling)
                if level > request.level:
                    self._raise(request, level, decision.reason, now)

    def relieve(self, chunks: list[Chunk], now: float) -> None:
        """Converts layers, of the longest requests first, until the step has the memory it needs.

        Raises:
            EngineError: if that is not enough, which admission rules out.
        """
        after = {chunk.request.id: chunk.request.computed + chunk.count for chunk in chunks}
        requests = sorted(self._scheduler.running.values(), key=lambda r: after.get(r.id, r.computed), reverse=True)
        slot = self._arena.slot_units
        # First layers whose pages pay for their slot; then those that would outgrow a slot in this very step.
        for self_financing in (True, False):
            for request in requests:
                missing = self._scheduler.missing_units([c for c in chunks if c.request.status is Status.RUNNING])
                if not missing:
                    return
                gain = self._arena.page_count(after.get(request.id, request.computed)) - slot
                pays = self._arena.page_count(request.computed) >= slot
                if gain > 0 and pays == self_financing and request.status is Status.RUNNING:
                    level = min(request.level - (-missing // gain), request.ceiling)
                    if level > request.level:
                        self._raise(request, level, "memory", now)
        missing = self._scheduler.missing_units([c for c in chunks if c.request.status is Status.RUNNING])
        if missing:
            raise EngineError(
                f"{missing} memory units are missing although every claim was granted: this is a bug in dsla"
            )

    def signals(self) -> Signals:
        """The load now."""
        wanted = self._scheduler.wanted_units(self._scheduler.plan())
        return Signals(
            budget_bytes=self._arena.budget_bytes,
            kv_bytes=self._arena.kv_bytes,
            state_bytes=self._arena.state_bytes,
            wanted_bytes=wanted * self._arena.page_bytes,
            new_level=self.new_level,
            max_level=self.max_level,
        )

    def _summary(self, request: Request) -> RequestSummary:
        prompt_pages, slot = self._arena.page_count(len(request.prompt)), self._arena.slot_units
        kept = self._decoder.n_layers - request.level
        saved_now = self._arena.page_count(request.computed) - slot if request.computed else 0
        page_bytes = self._arena.page_bytes
        return RequestSummary(
            id=request.id,
            level=request.level,
            max_level=request.ceiling,
            computed_tokens=request.computed,
            saving_per_layer=saved_now * page_bytes,
            prompt_bytes=(kept * prompt_pages + request.level * slot) * page_bytes,
            prompt_saving_per_layer=(prompt_pages - slot) * page_bytes,
        )

    def _starts(self, request: Request) -> list[tuple[int, int]]:
        """Levels to start at, with their ceilings: the one asked for by hand or by policy, then those nearest to it."""
        low, high = request.min_level, request.max_level
        if self.forced is not None:
            wanted = self.forced
        else:
            wanted = self.new_level if self._scheduler.converts_profitably(request) else low
        wanted = min(max(wanted, low), high)
        may_rise = self.forced is None and self._decoder.foldable
        levels = sorted(range(low, high + 1), key=lambda level: abs(level - wanted))
        return [(level, high if may_rise else level) for level in levels]

    def _affordable(self, request: Request, wanted: int) -> int:
        """The highest level up to `wanted` that claims and free memory allow."""
        if request.computed and not self._decoder.foldable:
            return request.level
        cost = self._arena.slot_units - self._arena.page_count(request.computed) if request.computed else 0
        room, free = self._scheduler.room(request), self._arena.free_units
        for level in range(wanted, request.level, -1):
            claim = self._scheduler.claim(request, level, max(level, request.ceiling))
            if claim <= room and (level - request.level) * cost <= free:
                return level
        return request.level

    def _raise(self, request: Request, level: int, reason: str, now: float) -> None:
        memory = request.memory
        if memory is None:
            raise EngineError(f"request {request.id!r} has no memory to convert: it is not running")
        before, free = request.level, self._arena.free_units
        for layer in self._decoder.order[before:level]:
            try:
                memory.fold(layer, self._decoder.mixers[layer], request.computed)
            except EngineError as error:
                self._fail(request, str(error), now)
                return
            request.folded_tokens += request.computed
        request.enter_level(level)
        freed = (self._arena.free_units - free) * self._arena.page_bytes
        self._log.add(Event(now, "level", request.id, reason, before, level, request.computed, freed))
