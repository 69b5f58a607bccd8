"""Who runs, and what a step computes. Admission promises: every byte a started request may come to need can be had.

A running request is counted at what it takes in the end if everything that may be converted is: KV pages of its full
length for layers that stay, a slot for converted layers, and the cheaper of the two for layers that may still be
converted. The sum over running requests never exceeds the budget, so conversion alone can always make the room the next
token needs, and nothing that was started is ever thrown out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dsla.engine.arena import Arena
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


class Scheduler:
    """Queue, running requests, and their claims on memory.

    Args:
        arena: the memory.
        n_layers: layers of the model.
        max_running: requests that run at once, at most.
        max_step_tokens: tokens a step computes, at most.
    """

    def __init__(self, arena: Arena, n_layers: int, max_running: int, max_step_tokens: int) -> None:
        self._arena, self._n_layers = arena, n_layers
        self._max_running, self._max_step_tokens = max_running, max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}

    def claim(self, request: Request, level: int, ceiling: int) -> int:
        """Units a request may come to need at `level`, if it may be raised to `ceiling`."""
        pages, slot = self._arena.page_count(request.final_tokens), self._arena.slot_units
        kept = self._n_layers - max(level, ceiling)
        return kept * pages + level * slot + max(ceiling - level, 0) * min(pages, slot)

    @property
    def claimed_units(self) -> int:
        """Units all running requests may come to need."""
        return sum(self.claim(request, request.level, request.ceiling) for request in self.running.values())

    def room(self, request: Request) -> int:
        """Units `request` can claim beside the claims of all others."""
        own = self.claim(request, request.level, request.ceiling) if request.id in self.running else 0
        return self._arena.n_units - self.claimed_units + own

    def converts_profitably(self, request: Request) -> bool:
        """Whether converting a layer of `request` frees memory: now, or, with nothing computed yet, in the end."""
        tokens = request.computed or request.final_tokens
        return self._arena.page_count(tokens) > self._arena.slot_units

    def head(self) -> Request | None:
        """The request to start next, if one may start at all."""
        return self.waiting[0] if self.waiting and len(self.running) < self._max_running else None

    def start_head(self) -> None:
        """Moves the head of the queue to the running requests."""
        request = self.waiting.popleft()
        request.status = Status.RUNNING
        self.running[request.id] = request

    def remove(self, request: Request) -> None:
        """Takes a request out of the queue, or out of the running requests with all its memory."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            del self.running[request.id]
        if request.memory is not None:
            request.memory.release()
            request.memory = None
        request.status = Status.FINISHED

    def plan(self) -> list[Chunk]:
        """What the next step computes: one token of every decoding request, then prompts in order of arrival."""
        return list(self._chunks())

    def _chunks(self) -> Iterator[Chunk]:
        left = self._max_step_tokens
        for request in self.running.values():
            if request.pending == 1:
                left -= 1
                yield Chunk(request, 1)
        for request in self.running.values():
            if request.pending > 1 and left > 0:
                count = min(request.pending, left)
                left -= count
                yield Chunk(request, count)

    def wanted_units(self, chunks: list[Chunk]) -> int:
        """Units a step takes beside those in use."""
        return sum(
            chunk.request.memory.units_to_hold(chunk.request.computed + chunk.count)
            for chunk in chunks
            if chunk.request.memory is not None
        )

    def missing_units(self, chunks: list[Chunk]) -> int:
        """Units a step lacks (0 = none)."""
        return max(self.wanted_units(chunks) - self._arena.free_units, 0)
