"""Who runs, and what a step computes.

Admission promises a running request the bytes of the tokens it has and of some to come, counted as if everything were
converted that may be: KV pages for layers that stay, a slot for converted layers, and the cheaper of the two for layers that
may still be converted. Where requests come to need more than was promised, and conversion does not make the room, the
request that came last goes back to the queue and later takes up where it was.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dsla.engine.arena import Arena
from dsla.engine.cost import StepWork
from dsla.engine.pace import Pace
from dsla.engine.request import Request, Status


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a running request."""

    request: Request
    count: int

    @property
    def sample(self) -> bool:
        """Whether they are the last ones known, so that the next token can be chosen."""
        return self.count == self.request.pending

    @property
    def work(self) -> StepWork:
        """What computing them takes."""
        request, kept = self.request, self.request.memory.kept_layers if self.request.memory is not None else 0
        if self.count == 1:
            return StepWork.decode(request.computed, kept, request.level)
        return StepWork.prefill(self.count, request.computed, kept, request.level)

    @property
    def units(self) -> int:
        """Units they take beside those in use."""
        memory = self.request.memory
        return 0 if memory is None else memory.units_to_hold(self.request.computed + self.count)


class Scheduler:
    """Queue, running requests, and their claims on memory.

    Args:
        arena: the memory.
        n_layers: layers of the model.
        max_running: requests that run at once, at most.
        max_step_tokens: tokens a step computes, at most.
        reserve_tokens: tokens to come that a running request is promised memory for, at least.
        pace: how much a step may do.

    Attributes:
        max_step_tokens: as given.
        reserve_tokens: as given.
    """

    def __init__(
        self, arena: Arena, n_layers: int, max_running: int, max_step_tokens: int, reserve_tokens: int, pace: Pace
    ) -> None:
        self._arena, self._n_layers = arena, n_layers
        self._max_running, self.max_step_tokens = max_running, max_step_tokens
        self.reserve_tokens, self._pace = reserve_tokens, pace
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}

    def claim(self, request: Request, level: int, ceiling: int, tokens: int | None = None) -> int:
        """Units a request needs for `tokens` tokens (default: those promised) at `level`, if it may rise to `ceiling`."""
        pages, slot = (
            self._arena.page_count(self._promised(request) if tokens is None else tokens),
            self._arena.slot_units,
        )
        kept = self._n_layers - max(level, ceiling)
        return kept * pages + level * slot + max(ceiling - level, 0) * min(pages, slot)

    def holds(self, request: Request, level: int, ceiling: int) -> bool:
        """Whether the memory holds a request to its end, with nobody beside it; arguments as `claim`."""
        return self.claim(request, level, ceiling, request.final_tokens) <= self._arena.n_units

    def room(self, request: Request) -> int:
        """Units `request` can claim beside the claims of all others; what they share counts once."""
        others = [other for other in self.running.values() if other is not request]
        claimed = sum(self.claim(other, other.level, other.ceiling) for other in others)
        held = sum(other.memory.units for other in self.running.values() if other.memory is not None)
        shared = held - (self._arena.n_units - self._arena.free_units)
        return self._arena.n_units - claimed + shared

    def head(self) -> Request | None:
        """The request to start next, if one may start at all; siblings wait until the prompt they share is computed."""
        if len(self.running) >= self._max_running:
            return None
        return next((request for request in self.waiting if not self._follows(request)), None)

    def start(self, request: Request) -> None:
        """Moves a waiting request to the running ones."""
        self.waiting.remove(request)
        request.status = Status.RUNNING
        self.running[request.id] = request

    def followers(self, leader: Request) -> list[Request]:
        """Waiting siblings of a request, as many as may run."""
        free = self._max_running - len(self.running)
        return [request for request in self.waiting if request.sibling_of == leader.id and not request.levels][:free]

    def remove(self, request: Request) -> None:
        """Takes a request out of the queue or of the running ones; its memory is the caller's."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            del self.running[request.id]
        request.status = Status.FINISHED

    def put_back(self, request: Request) -> None:
        """Moves a running request to the queue, before all that came after it; its memory is the caller's."""
        del self.running[request.id]
        request.status = Status.WAITING
        place = next((i for i, other in enumerate(self.waiting) if other.arrival > request.arrival), len(self.waiting))
        self.waiting.insert(place, request)

    def by_arrival(self) -> list[Request]:
        """Running requests, in order of arrival."""
        return sorted(self.running.values(), key=lambda request: request.arrival)

    def plan(self) -> list[Chunk]:
        """What the next step computes: one token of every decoding request, then prompts.

        The prompt that came first gets half of what it would get alone, at least; the other half goes to those that have less
        left to read, the least first, so that nobody waits for a long prompt to be read whole. What is left then is for the
        first one again, and after it for the others in order of arrival.
        """
        return list(self._chunks())

    def wanted_units(self, chunks: list[Chunk]) -> int:
        """Units a step takes beside those in use."""
        return sum(chunk.units for chunk in chunks)

    def missing_units(self, chunks: list[Chunk]) -> int:
        """Units a step lacks (0 = none)."""
        return max(self.wanted_units(chunks) - self._arena.free_units, 0)

    def _chunks(self) -> Iterator[Chunk]:
        left, work = self.max_step_tokens, StepWork()
        running = self.by_arrival()
        ready = [request for request in running if not request.replaying or request.level == request.replayed_level]
        for request in ready:
            if request.pending == 1:
                chunk = Chunk(request, 1)
                left, work = left - 1, work + chunk.work
                yield chunk
        counts: dict[str, int] = {}
        for request, share in _turns([request for request in ready if request.pending > 1]):
            counted = counts.get(request.id, 0)
            most = min(request.pending, request.tokens_before_pause()) - counted
            prior, kept = request.computed + counted, self._n_layers - request.level
            fits = self._pace.chunk(min(most, left), prior, kept, request.level, work) if min(most, left) > 0 else 0
            count = math.ceil(fits * share)
            if count:
                counts[request.id] = counted + count
                left, work = left - count, work + StepWork.prefill(count, prior, kept, request.level)
        yield from (Chunk(request, counts[request.id]) for request in ready if request.id in counts)

    def _promised(self, request: Request) -> int:
        known = len(request.prompt) + len(request.output)
        return min(known + self.reserve_tokens, request.final_tokens)

    def _follows(self, request: Request) -> bool:
        """Whether the request whose prompt it shares is still to compute it."""
        leader = self.running.get(request.sibling_of) if request.sibling_of is not None else None
        return leader is not None and not leader.output and not request.levels


def _turns(reading: list[Request]) -> Iterator[tuple[Request, float]]:
    """Whose prompt is read next in a step, and how much of what fits, as `Scheduler.plan` says."""
    if not reading:
        return
    first, *others = reading
    shorter = sorted((request for request in others if request.pending < first.pending), key=lambda r: r.pending)
    if shorter:
        yield first, 0.5
        yield from ((request, 1.0) for request in shorter)
    yield first, 1.0
    yield from ((request, 1.0) for request in others if request.pending >= first.pending)
