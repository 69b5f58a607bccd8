"""Who starts, where, and with what: levels of new requests, memory that others have computed, requests taken up again."""

from __future__ import annotations

from dataclasses import dataclass

from dsla.engine.arena import Arena
from dsla.engine.decoder import PackedDecoder
from dsla.engine.events import Event, EventLog
from dsla.engine.history import before, level_at
from dsla.engine.memory import RequestMemory
from dsla.engine.pace import Pace
from dsla.engine.prefix import PrefixCache, Snapshot
from dsla.engine.request import Goal, Request
from dsla.engine.scheduler import Scheduler
from dsla.engine.signals import start_level


@dataclass
class LevelRules:
    """What decides the levels of new requests.

    Attributes:
        forced: level set by hand, or None.
        foldable: whether layers of running requests can be converted.
        new_level: level of new requests that save memory by it, where none is forced.
        new_fast_level: level of new requests that save time by it, likewise.
        min_gain: part of its time that a request must save, all layers converted, for `new_fast_level` to hold.
    """

    forced: int | None
    foldable: bool
    new_level: int = 0
    new_fast_level: int = 0
    min_gain: float = 0.0

    def wanted(self, request: Request, bytes_saved: float, gain: float) -> int:
        """The level asked for by hand or by policy, within the request's bounds.

        Args:
            request: the request.
            bytes_saved: bytes (or units) each converted layer saves of it; negative where it takes some.
            gain: part of its time that all layers converted would save; negative likewise.
        """
        saves_time = gain > 0 and gain >= self.min_gain
        by_policy = start_level(self.new_level, self.new_fast_level, bytes_saved > 0, saves_time)
        return min(max(by_policy if self.forced is None else self.forced, request.min_level), request.max_level)

    def starts(self, request: Request, wanted: int) -> list[tuple[int, int]]:
        """Levels to start at, with their ceilings: the one that is wanted, then those nearest to it."""
        may_rise = self.forced is None and self.foldable
        levels = sorted(range(request.min_level, request.max_level + 1), key=lambda level: abs(level - wanted))
        return [(level, request.max_level if may_rise else level) for level in levels]

    def reuses(self, held: int, wanted: int, request: Request) -> bool:
        """Whether a request that is to start at `wanted` may go on with what was computed at level `held`.

        Up to the wanted level it may, and is raised then. Above it only where nobody fixed the level: what was computed
        for the conversation before is worth more than a lower level for the rest of it.
        """
        if held < wanted:
            return self.foldable
        return held == wanted or (self.forced is None and held <= request.max_level)


class Admission:
    """Starts waiting requests, in order, as far as memory allows.

    Args:
        decoder: the model.
        arena: the memory.
        scheduler: the requests.
        cache: what earlier requests left.
        rules: decides levels.
        pace: what steps cost.
        log: where events go.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        arena: Arena,
        scheduler: Scheduler,
        cache: PrefixCache,
        rules: LevelRules,
        pace: Pace,
        log: EventLog,
    ) -> None:
        self._decoder, self._arena, self._scheduler = decoder, arena, scheduler
        self._cache, self._rules, self._pace, self._log = cache, rules, pace, log

    def smallest_claim(self, request: Request) -> int:
        """The fewest units `request` can be run to its end with under the present settings; from any thread."""
        forced = self._rules.forced
        starts = self._rules.starts(request, 0 if forced is None else forced)
        claims = [self._scheduler.claim(request, *start, request.final_tokens) for start in starts]
        return min(claims if forced is None else claims[:1])

    def wanted(self, request: Request) -> int:
        """Level a request is to start at."""
        saved = self._arena.page_count(request.final_tokens) - self._arena.slot_units
        return self._rules.wanted(request, saved, self._gain(request) if self._rules.new_fast_level else 0.0)

    def _gain(self, request: Request) -> float:
        """Part of the time of a new request that all layers converted would save."""
        cost, running = self._pace.cost, self._scheduler.running.values()
        if cost is None:
            return 0.0
        tokens, expected = len(request.prompt), min(request.max_tokens, self._scheduler.reserve_tokens)
        rows, alike = len(running) + 1, sum(len(other.prompt) >= cost.break_even_keys for other in running) + 1
        saved = cost.saving_per_layer(tokens, expected, rows=rows, converted_rows=alike) * len(self._decoder.order)
        whole = cost.request_seconds(tokens, expected, self._decoder.n_layers, rows=rows)
        return saved / whole if whole else 0.0

    def profitable(self, request: Request) -> bool:
        """Whether converting a layer of `request` frees memory: now, or, while its prompt is being read, in the end."""
        tokens = request.final_tokens if request.prompt_left else request.computed
        return self._arena.page_count(tokens) > self._arena.slot_units

    def start(self, now: float) -> bool:
        """Starts waiting requests, in order, as long as their claims fit; whether there were any."""
        started = False
        while (request := self._scheduler.head()) is not None:
            if request.parked is not None:
                begins = self._unpark(request)
            else:
                begins = self._replay(request) if request.levels else self._begin(request)
            if not begins:
                break
            started = True
            self._start(request, "admitted" if not request.replay_until else "resumed", now)
        return started

    def fork(self, leader: Request, now: float) -> list[Request]:
        """Starts siblings of a request that has just computed its prompt, from a copy of what it remembers.

        Returns:
            Those that found room; the others stay in the queue.
        """
        forked = []
        for request in self._scheduler.followers(leader):
            memory = leader.memory
            claim = self._scheduler.claim(request, leader.level, leader.ceiling)
            holds = self._scheduler.holds(request, leader.level, leader.ceiling)
            if memory is None or not holds or not self._fits(request, claim, memory.copy_units(leader.computed), 0):
                break
            request.memory = memory.copy(leader.computed)
            request.computed, request.cached_tokens = leader.computed, leader.computed
            request.levels, request.level, request.ceiling = list(leader.levels), leader.level, leader.ceiling
            self._start(request, "forked", now)
            forked.append(request)
        return forked

    def _start(self, request: Request, reason: str, now: float) -> None:
        self._scheduler.start(request)
        if request.started_at is None:
            request.started_at = now
            self._log.time("queue", max(now - request.accepted_at, 0.0))
        self._log.add(Event(now, "start", request.id, reason, to_level=request.level, from_token=request.computed))

    def _begin(self, request: Request) -> bool:
        # The settings may be others than those it was accepted under, and what they ask for more than there is.
        starts = self._rules.starts(request, self.wanted(request))
        level, ceiling = next(start for start in starts if self._scheduler.holds(request, *start))
        found = self._cache.find(
            request.tokens,
            lambda snapshot, count: (
                self._rules.reuses(snapshot.level, level, request)
                and self._scheduler.holds(request, snapshot.level, max(ceiling, snapshot.level))
                and self._cache.units(snapshot, count) <= self._arena.free_units
            ),
        )
        held = level if found is None else found[0].level
        ceiling = max(ceiling, held)
        units, shared = (0, 0) if found is None else self._cost(*found)
        if not self._fits(request, self._scheduler.claim(request, held, ceiling), units, shared):
            return False
        request.ceiling = ceiling
        if found is None:
            request.enter_level(level)
            request.memory = self._empty(level)
        else:
            self._go_on(request, *found)
            if request.started_at is None:  # later, what is found is its own work
                request.cached_tokens = request.computed
            if level > held:
                request.goal = Goal(level, "start")
        return True

    def _replay(self, request: Request) -> bool:
        found = self._cache.find(
            request.tokens,
            lambda snapshot, count: (
                before(snapshot.levels, count) == before(request.levels, count)
                and snapshot.level <= level_at(request.levels, count)
                and self._cache.units(snapshot, count) <= self._arena.free_units
            ),
        )
        units, shared = (0, 0) if found is None else self._cost(*found)
        if not self._fits(request, self._peak(request), units, shared):
            return False
        if self._rules.forced is None and self._rules.foldable:
            request.ceiling = request.max_level
        if found is None:
            request.enter_level(request.levels[0][1])
            request.memory = self._empty(request.level)
        else:
            self._go_on(request, *found)
        return True

    def _unpark(self, request: Request) -> bool:
        assert request.parked is not None
        units = request.parked.units
        if not self._fits(
            request, max(self._scheduler.claim(request, request.level, request.ceiling), units), units, 0
        ):
            return False
        request.memory = RequestMemory.unpark(self._arena, self._decoder.n_layers, request.parked)
        request.parked = None
        return True

    def _fits(self, request: Request, claim: int, units: int, shared: int) -> bool:
        """Whether a request may start.

        Args:
            request: the request.
            claim: units it may come to need.
            units: units it takes at once.
            shared: units of its claim that are live already.
        """
        alone = not self._scheduler.running
        return units <= self._arena.free_units and (alone or claim - shared <= self._scheduler.room(request))

    def _peak(self, request: Request) -> int:
        """The most units it needs until all its history has been done again."""
        ends = [*(start for start, _ in request.levels[1:]), request.replay_until]
        return max(
            self._scheduler.claim(request, level, level, end)
            for (_, level), end in zip(request.levels, ends, strict=True)
        )

    def _cost(self, snapshot: Snapshot, count: int) -> tuple[int, int]:
        return self._cache.units(snapshot, count), snapshot.memory.live_units(count)

    def _go_on(self, request: Request, snapshot: Snapshot, count: int) -> None:
        request.memory = self._cache.take(snapshot, count)
        request.computed, request.level = count, snapshot.level
        if not request.levels:
            request.levels = before(snapshot.levels, count + 1)

    def _empty(self, level: int) -> RequestMemory:
        return RequestMemory(self._arena, self._decoder.n_layers, self._decoder.order[:level])
