"""Levels of running requests: which rise by hand, by policy, or for lack of memory, and when; and who gives way otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsla.engine.admission import Admission, LevelRules
from dsla.engine.arena import Arena
from dsla.engine.decoder import PackedDecoder
from dsla.engine.events import Event, EventLog
from dsla.engine.load import Load
from dsla.engine.pace import Pace
from dsla.engine.request import Goal, Request, Status
from dsla.engine.scheduler import Chunk, Scheduler
from dsla.engine.signals import Decision, Policy
from dsla.errors import EngineError


class LevelControl:
    """Decides and carries out every change of a running request's level.

    Args:
        decoder: the model.
        arena: the memory.
        scheduler: the requests.
        admission: starts requests, by `rules`.
        rules: levels of new requests; this object changes them.
        log: where events go.
        policy: decides where no level is forced; None = a level is always forced.
        level: forced level, or None.
        fail: called with a request whose states are broken and a message; it must remove the request.
        preempt: called with a request that must give its memory back; it goes to the queue.
        pace: how many layers may be converted in a step.
        load: what the policy sees.

    Attributes:
        max_level: highest level of the model.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        arena: Arena,
        scheduler: Scheduler,
        admission: Admission,
        rules: LevelRules,
        log: EventLog,
        policy: Policy | None,
        level: int | None,
        fail: Callable[[Request, str, float], None],
        preempt: Callable[[Request, float], None],
        pace: Pace,
        load: Load,
    ) -> None:
        self._decoder, self._arena, self._scheduler, self._log = decoder, arena, scheduler, log
        self._admission, self._rules = admission, rules
        self._policy, self._fail, self._preempt = policy, fail, preempt
        self._pace, self._load = pace, load
        self._policy_state: Any = None
        self.max_level = len(decoder.order)
        self.force(0 if level is None and policy is None else level, None)

    @property
    def forced(self) -> int | None:
        """Level set by hand, or None."""
        return self._rules.forced

    @property
    def adaptive(self) -> bool:
        """Whether there is a policy, which decides where no level is forced."""
        return self._policy is not None

    @property
    def new_level(self) -> int:
        """Level new requests start at under the policy."""
        return self._rules.new_level

    def force(self, level: int | None, now: float | None) -> None:
        """Fixes the level of all requests from the next step on, or (None) leaves it to the policy again.

        Raises:
            EngineError: if there is no such level, or no policy to return to.
        """
        self.check(level)
        self._rules.forced, self._rules.new_level, self._rules.new_fast_level = level, 0, 0
        self._policy_state = None
        for request in (*self._scheduler.running.values(), *self._scheduler.waiting):
            request.goal, request.deferred = None, False
            if level is None and self._decoder.foldable and request.levels:
                request.ceiling = max(request.ceiling, request.max_level)
        if now is not None:
            self._log.add(Event(now, "force-level", None, "adaptive" if level is None else "by hand", to_level=level))

    def check(self, level: int | None) -> None:
        """Checks that `level` can be forced; errors as `force`."""
        if level is None and self._policy is None:
            raise EngineError("this engine has no policy to return to: give a level")
        if level is not None and not 0 <= level <= self.max_level:
            raise EngineError(f"level {level} is out of range: this model has levels 0 to {self.max_level}")

    def decide(self, now: float) -> None:
        """Sets the goals of running requests, by hand or by policy."""
        if self.forced is not None:
            for request in self._scheduler.running.values():
                self._aim(request, min(self.forced, request.max_level), "by hand")
        elif self._policy is not None:
            load = self._load.signals(), self._load.summaries(), now
            self._policy_state, decisions = self._policy(self._policy_state, *load)
            if any(decision.min_gain is not None for decision in decisions):
                self._load.steered(now)
            for decision in decisions:
                if decision.request_id is None:
                    self._set_new_level(decision, now)
                    continue
                named = self._scheduler.running.get(decision.request_id)
                if named is not None and self._admission.profitable(named):
                    self._aim(named, min(decision.level, named.ceiling), decision.reason)

    def convert(self, now: float) -> None:
        """Takes requests towards their goals, and replays what their histories state, as far as memory lets it."""
        for request in self._scheduler.by_arrival():
            if request.replaying:
                self._replay(request, now)
            elif request.goal is not None:
                goal = request.goal
                self._raise(request, goal.level, goal.reason, now)
                waits = request.status is Status.RUNNING and request.level < goal.level
                if waits and not (self._decoder.foldable and not self._pace.converts()):
                    self._defer(request, goal, now)

    def relieve(self, chunks: list[Chunk], now: float) -> list[Chunk]:
        """Makes the room a step needs: by conversions, by shorter chunks of prompts, by sending requests back.

        Returns:
            What the step computes; nothing where conversions alone take its time, and the next one goes on with them.

        Raises:
            EngineError: if a request that is alone finds no room, which admission rules out.
        """
        while True:
            spent = self._pace.spent
            chunks = self._convert_for(chunks, now)
            if self._pace.spent > spent:
                chunks = self._in_time(chunks)
            fitting = self._fitting(chunks)
            if fitting or not chunks or not self._pace.converts():
                return fitting
            last = self._scheduler.by_arrival()[-1]
            if len(self._scheduler.running) == 1:
                raise EngineError(f"request {last.id!r} has no room although it is alone: this is a bug in dsla")
            self._preempt(last, now)
            chunks = [chunk for chunk in chunks if chunk.request is not last]

    def _set_new_level(self, decision: Decision, now: float) -> None:
        name = "new_level" if decision.min_gain is None else "new_fast_level"
        before, level = getattr(self._rules, name), min(max(decision.level, 0), self.max_level)
        if level != before:
            self._log.add(Event(now, name.replace("_", "-"), None, decision.reason, from_level=before, to_level=level))
            setattr(self._rules, name, level)
        if decision.min_gain is not None:
            self._rules.min_gain = decision.min_gain

    def _aim(self, request: Request, level: int, reason: str) -> None:
        if level > max(request.level, request.goal.level if request.goal else 0):
            request.goal = Goal(level, reason)

    def _defer(self, request: Request, goal: Goal, now: float) -> None:
        if not request.deferred:
            request.deferred = True
            reason = "no memory for states" if self._decoder.foldable else "adapter not foldable"
            self._log.add(Event(now, "defer", request.id, reason, from_level=request.level, to_level=goal.level))

    def _convert_for(self, chunks: list[Chunk], now: float) -> list[Chunk]:
        """Converts layers, of the longest requests first, until a step has the memory it needs, as far as that helps."""
        after = {chunk.request.id: chunk.request.computed + chunk.count for chunk in chunks}
        requests = sorted(self._scheduler.running.values(), key=lambda r: after.get(r.id, r.computed), reverse=True)
        # First layers whose pages pay for their slot; then those that would outgrow a slot in this very step.
        for self_financing in (True, False):
            for request in requests:
                missing = self._scheduler.missing_units(chunks)
                if not missing:
                    return chunks
                gain, pays = self._gain(request, after.get(request.id, request.computed))
                if gain > 0 and pays == self_financing:
                    level = min(request.level - (-missing // gain), request.ceiling)
                    self._raise(request, level, "memory", now)
                    chunks = [chunk for chunk in chunks if chunk.request.status is Status.RUNNING]
        return chunks

    def _in_time(self, chunks: list[Chunk]) -> list[Chunk]:
        """The same, the prompts no longer than the time that conversions have left allows."""
        planned = {chunk.request.id: chunk.count for chunk in self._scheduler.plan()}
        return [
            Chunk(chunk.request, min(chunk.count, planned[chunk.request.id]))
            for chunk in chunks
            if chunk.request.id in planned
        ]

    def _gain(self, request: Request, tokens: int) -> tuple[int, bool]:
        """Units a request of `tokens` tokens needs less with one more layer converted, and whether that frees some now."""
        memory, slot = request.memory, self._arena.slot_units
        convertible = request.level < request.ceiling and self._decoder.foldable and not request.replaying
        if memory is None or request.status is not Status.RUNNING or not convertible:
            return 0, False
        freed = memory.fold_gain(self._decoder.order[request.level]) + slot
        return freed + self._arena.page_count(tokens) - memory.pages - slot, freed >= slot

    def _fitting(self, chunks: list[Chunk]) -> list[Chunk]:
        """What of a step fits: every decode, then prompts in order, the last as far as it fits; or nothing at all."""
        fitting = [chunk for chunk in chunks if chunk.request.pending == 1]
        free = self._arena.free_units - self._scheduler.wanted_units(fitting)
        if free < 0:
            return []
        for chunk in chunks:
            if chunk.request.pending > 1 and chunk.request.memory is not None:
                count = min(chunk.count, chunk.request.memory.tokens_within(free) - chunk.request.computed)
                if count < 1:
                    break
                fitting.append(Chunk(chunk.request, count))
                free -= fitting[-1].units
        return fitting

    def _replay(self, request: Request, now: float) -> None:
        """Converts what had been converted at this token before, as far as the step's time allows.

        Others that came later give way if it is the oldest.
        """
        while request.level < request.replayed_level and request.memory is not None and self._pace.converts():
            layer = self._decoder.order[request.level]
            if request.computed and -request.memory.fold_gain(layer) > self._arena.free_units:
                by_arrival = self._scheduler.by_arrival()
                if by_arrival[0] is not request or by_arrival[-1] is request:
                    return
                self._preempt(by_arrival[-1], now)
            elif self._fold(request, layer, now):
                self._pace.converted()
            else:
                return

    def _raise(self, request: Request, level: int, reason: str, now: float) -> None:
        """Converts layers of a running request up to `level`, as far as memory and the step's time allow."""
        before, free = request.level, self._arena.free_units
        for layer in self._decoder.order[before:level]:
            if not self._affordable(request, layer) or not self._pace.converts():
                break
            request.folded_tokens += request.computed
            if not self._fold(request, layer, now):
                return
            self._pace.converted()
        if request.level > before:
            freed = (self._arena.free_units - free) * self._arena.page_bytes
            self._log.add(Event(now, "level", request.id, reason, before, request.level, request.computed, freed))

    def _affordable(self, request: Request, layer: int) -> bool:
        """Whether memory, and what was promised to others, allow the next layer to be converted."""
        memory, level, ceiling = request.memory, request.level, request.ceiling
        if memory is None:
            return False
        if request.computed and (not self._decoder.foldable or -memory.fold_gain(layer) > self._arena.free_units):
            return False
        higher = level + 1, max(level + 1, ceiling)
        if not self._scheduler.holds(request, *higher):
            return False
        claim = self._scheduler.claim(request, *higher)
        return claim <= max(self._scheduler.claim(request, level, ceiling), self._scheduler.room(request))

    def _fold(self, request: Request, layer: int, now: float) -> bool:
        """Converts one layer; whether it could be done."""
        if request.memory is None:
            raise EngineError(f"request {request.id!r} has no memory to convert: it is not running")
        began = self._pace.clock()
        try:
            request.memory.fold(layer, self._decoder.mixers[layer], request.computed)
        except EngineError as error:
            self._fail(request, str(error), now)
            return False
        if request.computed:
            self._log.time("fold", max(self._pace.clock() - began, 0.0))
        request.enter_level(request.level + 1)
        return True
