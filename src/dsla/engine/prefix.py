"""What ended or parked requests remember, kept for requests that begin with the same tokens.

Kept memory is immutable, takes only bytes that no running request wants, and is given back least recently used first.
It is known by its tokens and its level history: both decide what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsla.engine.arena import Arena
from dsla.engine.history import History, before
from dsla.engine.memory import RequestMemory
from dsla.errors import EngineError


@dataclass(eq=False)
class Snapshot:
    """What a request remembered after some tokens.

    Attributes:
        tokens: those tokens `[n]`, int64.
        levels: level history; an entry at n is a conversion after the last of them.
        memory: pages and slots.
    """

    tokens: np.ndarray
    levels: History
    memory: RequestMemory

    @property
    def level(self) -> int:
        """Layers its memory has converted."""
        return self.levels[-1][1]

    def shares(self, tokens: np.ndarray) -> int:
        """How many tokens of another text can be had from it: any beginning at level 0, else all of it or nothing."""
        n = min(len(self.tokens), len(tokens))
        differs = self.tokens[:n] != tokens[:n]
        common = int(differs.argmax()) if differs.any() else n
        return common if self.level == 0 or common == len(self.tokens) else 0


class PrefixCache:
    """Snapshots, least recently used first.

    Args:
        arena: the memory; its `reclaim` is set to give snapshots back.
        limit_bytes: bytes to keep at most; None = all that running requests leave.
    """

    def __init__(self, arena: Arena, limit_bytes: int | None = None) -> None:
        self._arena, self._limit = arena, limit_bytes
        self._snapshots: dict[Snapshot, None] = {}
        arena.reclaim = self._reclaim

    def __len__(self) -> int:
        return len(self._snapshots)

    def find(
        self, tokens: np.ndarray, accepts: Callable[[Snapshot, int], bool] = lambda snapshot, count: True
    ) -> tuple[Snapshot, int] | None:
        """The snapshot that saves most tokens of a text.

        Args:
            tokens: the text `[n]`, int64. Its last token is never found: its logits are wanted.
            accepts: whether a snapshot will do for so many tokens.

        Returns:
            The snapshot and the tokens to take from it, or None.
        """
        best: tuple[int, int, Snapshot] | None = None
        for snapshot in self._snapshots:
            count = snapshot.shares(tokens[:-1])
            if count < self._arena.page_tokens or (best is not None and (count, -snapshot.level) <= best[:2]):
                continue
            if accepts(snapshot, count):
                best = (count, -snapshot.level, snapshot)
        return None if best is None else (best[2], best[0])

    def units(self, snapshot: Snapshot, count: int) -> int:
        """Free units that `take` takes, at most."""
        return snapshot.memory.copy_units(count)

    def take(self, snapshot: Snapshot, count: int) -> RequestMemory:
        """Memory of a request that begins with the first `count` tokens of a snapshot.

        The snapshot stays where there is room for both, and is given up otherwise.

        Raises:
            EngineError: if fewer than `units` units are free.
        """
        # Out of reach of `reclaim` meanwhile.
        del self._snapshots[snapshot]
        memory = snapshot.memory
        alone = memory.units - memory.kept_layers * (count // self._arena.page_tokens)  # what both do not share
        stays = self._arena.free_units >= self.units(snapshot, count) + alone
        if not stays:
            memory.truncate(count)
        mine = memory.copy(count, move_slots=not stays)
        if stays:
            self._snapshots[snapshot] = None
        else:
            memory.release()
        return mine

    def add(self, tokens: Sequence[int] | np.ndarray, levels: History, memory: RequestMemory) -> None:
        """Keeps the memory of a running request as it is after `tokens`, which goes on; nothing where there is no room."""
        if self._limit == 0 or memory.slot_units > self._arena.free_units or self._known(tokens, levels):
            return
        self._keep(Snapshot(np.array(tokens, dtype=np.int64), list(levels), memory.snapshot(len(tokens))))

    def add_ended(self, tokens: Sequence[int] | np.ndarray, levels: History, memory: RequestMemory) -> None:
        """Keeps the memory of a request that has ended, or releases it."""
        if self._limit == 0 or len(tokens) < self._arena.page_tokens or self._known(tokens, levels):
            memory.release()
            return
        memory.retire(len(tokens))
        self._keep(Snapshot(np.array(tokens, dtype=np.int64), list(levels), memory))

    def forget(self, tokens: np.ndarray) -> None:
        """Gives back what a request with these tokens may have come from or have left: something in it is broken.

        Args:
            tokens: those it had computed `[n]`, int64.
        """
        for snapshot in list(self._snapshots):
            if snapshot.shares(tokens) >= min(self._arena.page_tokens, len(tokens)):
                self._drop(snapshot)

    def trim(self) -> None:
        """Gives back what is over the limit: memory that was shared with a request counts once that has ended."""
        while self._limit is not None and self._arena.kept_bytes > self._limit and self._snapshots:
            self._drop(next(iter(self._snapshots)))

    def clear(self) -> None:
        """Gives everything back."""
        for snapshot in list(self._snapshots):
            self._drop(snapshot)

    def _known(self, tokens: Sequence[int] | np.ndarray, levels: History) -> bool:
        """Whether a snapshot serves whatever one of these tokens would; it counts as used."""
        wanted = np.array(tokens, dtype=np.int64)
        for snapshot in self._snapshots:
            if snapshot.shares(wanted) == len(wanted) and before(snapshot.levels, len(wanted) + 1) == list(levels):
                del self._snapshots[snapshot]
                self._snapshots[snapshot] = None
                return True
        return False

    def _keep(self, snapshot: Snapshot) -> None:
        for other in list(self._snapshots):
            if other.level == snapshot.level == 0 and snapshot.shares(other.tokens) == len(other.tokens):
                self._drop(other)
        self._snapshots[snapshot] = None
        self.trim()

    def _drop(self, snapshot: Snapshot) -> None:
        del self._snapshots[snapshot]
        snapshot.memory.release()

    def _reclaim(self, units: int) -> None:
        """Gives back the least recently used snapshot, or, at level 0, as much of its end as is needed."""
        if not self._snapshots:
            raise EngineError("memory that is not live is kept, and nobody knows of it: this is a bug in dsla")
        snapshot = next(iter(self._snapshots))
        layers, page = snapshot.memory.kept_layers, self._arena.page_tokens
        pages = self._arena.page_count(len(snapshot.tokens))
        dropped = max(-(-units // max(layers, 1)), pages // 8, 1)
        if snapshot.level or dropped >= pages:
            self._drop(snapshot)
            return
        snapshot.tokens = snapshot.tokens[: (pages - dropped) * page]
        snapshot.memory.truncate(len(snapshot.tokens))
