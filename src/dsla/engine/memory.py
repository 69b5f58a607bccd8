"""What one request remembers: per layer, pages of keys and values or one state slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsla.engine.arena import Arena
from dsla.engine.pages import PageTable
from dsla.errors import EngineError
from dsla.mixers.base import Memory
from dsla.ops import gathered


class Foldable(Protocol):
    """A mixer that can take over a KV cache."""

    def fold_pages(self, pages: Memory, table: PageTable, tokens: int) -> Memory: ...


@dataclass(frozen=True)
class Parked:
    """What a request remembers, outside the arena.

    Attributes:
        pages: bytes of each kept layer's pages `[n_pages, page_bytes]`, uint8, on the host.
        slots: bytes of each converted layer's slot `[slot_units, page_bytes]`, uint8, on the host.
    """

    pages: dict[int, Tensor]
    slots: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(data.nbytes for part in (self.pages, self.slots) for data in part.values())

    @property
    def units(self) -> int:
        """Units it takes in an arena."""
        return sum(len(data) for part in (self.pages, self.slots) for data in part.values())


class RequestMemory:
    """Pages and slots of one request, or of a snapshot of one.

    Args:
        arena: where they lie.
        n_layers: layers of the model.
        converted: layers that start converted.
        live: whether a running request needs it; else it can be had back.
    """

    def __init__(self, arena: Arena, n_layers: int, converted: Sequence[int] = (), live: bool = True) -> None:
        self._arena, self._live = arena, live
        self._tables: list[PageTable | None] = [PageTable(live) for _ in range(n_layers)]
        self._slots: dict[int, int] = {}
        self._pages = 0
        for layer in converted:
            self._tables[layer] = None

    @property
    def kept_layers(self) -> int:
        """Layers that keep keys and values."""
        return sum(table is not None for table in self._tables)

    @property
    def units(self) -> int:
        """Units it holds, those that others hold as well included."""
        return self.kept_layers * self._pages + self.slot_units

    @property
    def slot_units(self) -> int:
        """Units of its slots."""
        return len(self._slots) * self._arena.slot_units

    def is_kept(self, layer: int) -> bool:
        """Whether `layer` keeps keys and values."""
        return self._tables[layer] is not None

    def table(self, layer: int) -> PageTable:
        """The pages of a kept layer."""
        table = self._tables[layer]
        if table is None:
            raise EngineError(f"layer {layer} is converted: it has no KV pages")
        return table

    def slot(self, layer: int) -> int:
        """The slot of a converted layer."""
        return self._slots[layer]

    @property
    def pages(self) -> int:
        """Pages of each kept layer."""
        return self._pages

    def tokens_within(self, units: int) -> int:
        """Tokens it can remember in all with so many more units."""
        units -= self.units_to_hold(self._pages * self._arena.page_tokens)
        if units < 0:
            return 0
        if not self.kept_layers:
            return 1 << 62
        return (self._pages + units // self.kept_layers) * self._arena.page_tokens

    def units_to_hold(self, tokens: int) -> int:
        """Units missing to remember `tokens` tokens in all."""
        pages = max(self._arena.page_count(tokens) - self._pages, 0)
        slots = len(self._tables) - self.kept_layers - len(self._slots)
        return self.kept_layers * pages + slots * self._arena.slot_units

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` tokens in all.

        Raises:
            EngineError: if the arena is full.
        """
        pages = max(self._arena.page_count(tokens) - self._pages, 0)
        for layer, table in enumerate(self._tables):
            if table is not None:
                self._arena.extend(table, pages)
            elif layer not in self._slots:
                self._slots[layer] = self._arena.allocate_slot()
        self._pages += pages

    def fold_gain(self, layer: int) -> int:
        """Units that folding a kept layer frees; negative where its slot takes more than its pages give."""
        return self._arena.exclusive_pages(self.table(layer)) - self._arena.slot_units

    def cached(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[tokens, G, D]` of a kept layer, gathered from its pages."""
        return gathered(self._arena.pages, self.table(layer), tokens)

    def fold(self, layer: int, mixer: Foldable, tokens: int) -> None:
        """Turns the cache of a kept layer into states; its pages are free afterwards.

        Args:
            layer: a kept layer.
            mixer: the layer's mixer.
            tokens: tokens cached so far.

        Raises:
            EngineError: if the states are not finite (nothing has changed then), or the arena is full.
        """
        memory = mixer.fold_pages(self._arena.pages, self.table(layer), tokens) if tokens else {}
        for name, value in memory.items():
            if not torch.isfinite(value).all():
                raise EngineError(f"folding layer {layer} gave non-finite {name} after {tokens} tokens")
        self._arena.release(self.table(layer))
        self._tables[layer] = None
        if not tokens:
            return
        slot = self._slots[layer] = self._arena.allocate_slot()
        for name, value in memory.items():
            self._arena.slots[name][slot] = value[0]

    def live_units(self, tokens: int) -> int:
        """Whole pages of the first `tokens` tokens that running requests need anyway."""
        whole = tokens // self._arena.page_tokens
        return self._arena.live_pages([table for table in self._tables if table is not None], whole)

    def copy_units(self, tokens: int) -> int:
        """Free units that `copy(tokens)` takes, at most."""
        whole = tokens // self._arena.page_tokens
        partial = whole * self._arena.page_tokens < tokens
        # Twice: while the last page is copied, the page it is copied from cannot be had back.
        return self.kept_layers * (whole + 2 * partial) - self.live_units(tokens) + self.slot_units

    def copy(self, tokens: int, *, move_slots: bool = False) -> RequestMemory:
        """Memory of another request that begins with the first `tokens` tokens of this one.

        Whole pages are shared, the last one, which both may go on to fill, is copied, as are slots.

        Args:
            tokens: tokens to share; all there are, unless every layer is kept.
            move_slots: take the slots instead of copying them. Nobody may use this memory then but to release it.

        Raises:
            EngineError: if the arena is full.
        """
        arena, whole = self._arena, tokens // self._arena.page_tokens
        other = self._empty(live=True)
        other._share(self, whole)
        if whole * arena.page_tokens < tokens:
            other.reserve_pages(1)
            layers = [layer for layer, table in enumerate(self._tables) if table is not None]
            if layers:
                arena.copy_pages(
                    [(self.table(layer), whole) for layer in layers], [(other.table(layer), whole) for layer in layers]
                )
        if move_slots:
            other._slots, self._slots = self._slots, {}
            for slot in other._slots.values():
                arena.set_slot_live(slot, True)
        else:
            other._copy_slots(self)
        return other

    def snapshot(self, tokens: int) -> RequestMemory:
        """What this memory holds after `tokens` tokens, which are all there are; it does not change any more.

        All pages are shared, the last one too: this memory only adds to it behind those tokens.

        Raises:
            EngineError: if the arena is full.
        """
        other = self._empty(live=False)
        other._share(self, self._arena.page_count(tokens))
        other._copy_slots(self)
        return other

    def retire(self, tokens: int) -> None:
        """Makes this memory, of which `tokens` tokens are wanted, one that can be had back."""
        self._live = False
        for table in self._tables:
            if table is not None:
                self._arena.retire(table)
        for slot in self._slots.values():
            self._arena.set_slot_live(slot, False)
        self.truncate(tokens)

    def truncate(self, tokens: int) -> None:
        """Gives back the pages behind the first `tokens` tokens."""
        pages = self._arena.page_count(tokens)
        if pages < self._pages:
            for table in self._tables:
                if table is not None:
                    self._arena.truncate(table, pages)
            self._pages = pages

    def park(self) -> Parked:
        """Copies everything to the host; the memory is released."""
        pages = {i: self._arena.page_data(table).cpu() for i, table in enumerate(self._tables) if table is not None}
        slots = {i: self._arena.slot_data(slot).to("cpu", copy=True) for i, slot in self._slots.items()}
        self.release()
        return Parked(pages, slots)

    @classmethod
    def unpark(cls, arena: Arena, n_layers: int, parked: Parked) -> RequestMemory:
        """The memory that was parked.

        Raises:
            EngineError: if the arena is full.
        """
        memory = cls(arena, n_layers, [layer for layer in range(n_layers) if layer not in parked.pages])
        memory.reserve_pages(max((len(data) for data in parked.pages.values()), default=0))
        for layer, data in parked.pages.items():
            arena.set_page_data(memory.table(layer), data)
        for layer, data in parked.slots.items():
            memory._slots[layer] = arena.allocate_slot()
            arena.slot_data(memory._slots[layer]).copy_(data)
        return memory

    def reserve_pages(self, count: int) -> None:
        """Adds pages to every kept layer.

        Raises:
            EngineError: if the arena is full.
        """
        for table in self._tables:
            if table is not None:
                self._arena.extend(table, count)
        self._pages += count

    def broken_layer(self, tokens: int) -> int | None:
        """The first layer that remembers something not finite of `tokens` tokens; None = there is none."""
        for layer, table in enumerate(self._tables):
            if table is not None:
                held = list(self.cached(layer, tokens))
            elif layer in self._slots:
                held = [pool[self._slots[layer]] for pool in self._arena.slots.values()]
            else:
                held = []
            if not all(_all_finite(tensor) for tensor in held):
                return layer
        return None

    def release(self) -> None:
        """Frees everything."""
        for table in self._tables:
            if table is not None:
                self._arena.release(table)
        for slot in self._slots.values():
            self._arena.free_slot(slot)
        self._slots.clear()
        self._pages = 0

    def _empty(self, live: bool) -> RequestMemory:
        converted = [layer for layer, table in enumerate(self._tables) if table is None]
        return RequestMemory(self._arena, len(self._tables), converted, live)

    def _share(self, source: RequestMemory, pages: int) -> None:
        for mine, table in zip(self._tables, source._tables, strict=True):
            if mine is not None and table is not None:
                self._arena.share(mine, table, pages)
        self._pages = pages

    def _copy_slots(self, source: RequestMemory) -> None:
        for layer, slot in source._slots.items():
            mine = self._slots[layer] = self._arena.allocate_slot(self._live)
            self._arena.slot_data(mine).copy_(self._arena.slot_data(slot))


def _all_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is finite; its sum is so only then, and takes a fraction of the time."""
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())
