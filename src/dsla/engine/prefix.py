"""What ended or parked requests remember, kept for requests that begin with the same tokens.

Kept memory is immutable, takes only bytes that no running request wants, and is given back least recently used first.
It is known by its tokens and its level history: both decide what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsla.engine.arena import Arena
from dsla.engine.history import History, before
from dsla.engine.memory import RequestMemory
from dsla.errors import EngineError

_TOKEN_BYTES = 8


@dataclass(eq=False)
class Snapshot:
    """What a request remembered after some tokens.

    Attributes:
        text: those tokens, as the bytes of int64, which compare fast.
        levels: level history; an entry at n is a conversion after the last of them.
        memory: pages and slots.
    """

    text: bytes
    levels: History
    memory: RequestMemory

    @property
    def tokens(self) -> np.ndarray:
        """Its tokens `[n]`, int64."""
        return np.frombuffer(self.text, dtype=np.int64)

    @property
    def level(self) -> int:
        """Layers its memory has converted."""
        return self.levels[-1][1]

    def shares(self, text: bytes) -> int:
        """How many tokens of another text can be had from it: any beginning at level 0, else all of it or nothing."""
        if self.level:
            return len(self.text) // _TOKEN_BYTES if text.startswith(self.text) else 0
        n = min(len(self.text), len(text)) // _TOKEN_BYTES
        differs = self.tokens[:n] != np.frombuffer(text, dtype=np.int64, count=n)
        return int(differs.argmax()) if differs.any() else n

    def may_share(self, text: bytes, count: int) -> bool:
        """False where it does not share `count` tokens of another text, by a look at the last of them."""
        end = count * _TOKEN_BYTES
        return len(self.text) >= end and self.text[end - _TOKEN_BYTES : end] == text[end - _TOKEN_BYTES : end]

    def serves(self, text: bytes) -> bool:
        """Whether all of a text can be had from it."""
        return self.text == text if self.level else self.text.startswith(text)


class PrefixCache:
    """Snapshots, least recently used first.

    Args:
        arena: the memory; its `reclaim` is set to give snapshots back.
        limit_bytes: bytes to keep at most; None = all that running requests leave.
    """

    def __init__(self, arena: Arena, limit_bytes: int | None = None) -> None:
        self._arena, self._limit = arena, limit_bytes
        self._snapshots: dict[Snapshot, None] = {}
        # By their first page of tokens, or all there are: nothing shorter than a page is of use. In the same order.
        self._by_page: dict[bytes, dict[Snapshot, None]] = {}
        self._page_bytes = arena.page_tokens * _TOKEN_BYTES
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
        text = tokens[:-1].tobytes()
        best, most, level = None, self._arena.page_tokens - 1, 0
        for snapshot in self._alike(text):
            least = most + (snapshot.level >= level)
            if not snapshot.level and not snapshot.may_share(text, least):
                continue
            count = snapshot.shares(text)
            if count >= least and accepts(snapshot, count):
                best, most, level = snapshot, count, snapshot.level
        return None if best is None else (best, most)

    def units(self, snapshot: Snapshot, count: int) -> int:
        """Free units that `take` takes, at most."""
        return snapshot.memory.copy_units(count)

    def take(self, snapshot: Snapshot, count: int) -> RequestMemory:
        """Memory of a request that begins with the first `count` tokens of a snapshot.

        The snapshot stays where there is room for both, and is given up otherwise.

        Raises:
            EngineError: if fewer than `units` units are free.
        """
        self._remove(snapshot)  # out of reach of `reclaim` meanwhile
        memory = snapshot.memory
        alone = memory.units - memory.kept_layers * (count // self._arena.page_tokens)  # what both do not share
        stays = self._arena.free_units >= self.units(snapshot, count) + alone
        if not stays:
            memory.truncate(count)
        mine = memory.copy(count, move_slots=not stays)
        if stays:
            self._put(snapshot)
        else:
            memory.release()
        return mine

    def add(self, tokens: Sequence[int] | np.ndarray, levels: History, memory: RequestMemory) -> None:
        """Keeps the memory of a running request as it is after `tokens`, which goes on; nothing where there is no room."""
        text = _text(tokens)
        if self._limit == 0 or memory.slot_units > self._arena.free_units or self._known(text, levels):
            return
        self._keep(Snapshot(text, list(levels), memory.snapshot(len(tokens))))

    def add_ended(self, tokens: Sequence[int] | np.ndarray, levels: History, memory: RequestMemory) -> None:
        """Keeps the memory of a request that has ended, or releases it."""
        text = _text(tokens)
        if self._limit == 0 or len(tokens) < self._arena.page_tokens or self._known(text, levels):
            memory.release()
            return
        memory.retire(len(tokens))
        self._keep(Snapshot(text, list(levels), memory))

    def forget(self, tokens: np.ndarray) -> None:
        """Gives back what a request with these tokens may have come from or have left: something in it is broken.

        Args:
            tokens: those it had computed `[n]`, int64.
        """
        text = _text(tokens)
        for snapshot in list(self._alike(text)):
            if snapshot.shares(text) >= min(self._arena.page_tokens, len(tokens)):
                self._drop(snapshot)

    def trim(self) -> None:
        """Gives back what is over the limit: memory that was shared with a request counts once that has ended."""
        while self._limit is not None and self._arena.kept_bytes > self._limit and self._snapshots:
            self._drop(next(iter(self._snapshots)))

    def clear(self) -> None:
        """Gives everything back."""
        for snapshot in list(self._snapshots):
            self._drop(snapshot)

    def _alike(self, text: bytes) -> Iterable[Snapshot]:
        """All that may share a page with a text, or all of it where it is shorter."""
        return self._by_page.get(text[: self._page_bytes], ()) if len(text) >= self._page_bytes else self._snapshots

    def _known(self, text: bytes, levels: History) -> bool:
        """Whether a snapshot serves whatever one of this text would; it counts as used."""
        after = len(text) // _TOKEN_BYTES + 1
        for snapshot in self._alike(text):
            if snapshot.serves(text) and before(snapshot.levels, after) == list(levels):
                self._remove(snapshot)
                self._put(snapshot)
                return True
        return False

    def _keep(self, snapshot: Snapshot) -> None:
        for end in range(_TOKEN_BYTES, self._page_bytes + 1, _TOKEN_BYTES) if snapshot.level == 0 else ():
            for other in list(self._by_page.get(snapshot.text[:end], ())):
                if other.level == 0 and snapshot.serves(other.text):
                    self._drop(other)
        self._put(snapshot)
        self.trim()

    def _put(self, snapshot: Snapshot) -> None:
        """Makes a snapshot the one used last."""
        self._snapshots[snapshot] = None
        self._by_page.setdefault(snapshot.text[: self._page_bytes], {})[snapshot] = None

    def _remove(self, snapshot: Snapshot) -> None:
        del self._snapshots[snapshot]
        page = snapshot.text[: self._page_bytes]
        del self._by_page[page][snapshot]
        if not self._by_page[page]:
            del self._by_page[page]

    def _drop(self, snapshot: Snapshot) -> None:
        self._remove(snapshot)
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
        left = (pages - dropped) * page
        snapshot.text = snapshot.text[: left * _TOKEN_BYTES]
        snapshot.memory.truncate(left)


def _text(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.array(tokens, dtype=np.int64).tobytes()
