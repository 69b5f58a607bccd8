"""What one request remembers: per layer, pages of keys and values or one state slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsla.engine.arena import Arena, PageTable
from dsla.errors import EngineError
from dsla.mixers.base import Memory
from dsla.ops import gathered


class Foldable(Protocol):
    """A mixer that can take over a KV cache."""

    def fold(self, k: Tensor, v: Tensor) -> Memory: ...


class RequestMemory:
    """Pages and slots of one request.

    Args:
        arena: where they lie.
        n_layers: layers of the model.
        converted: layers that start converted.
    """

    def __init__(self, arena: Arena, n_layers: int, converted: Sequence[int]) -> None:
        self._arena = arena
        self._tables: list[PageTable | None] = [PageTable() for _ in range(n_layers)]
        self._slots: dict[int, int] = {}
        self._pages = 0
        for layer in converted:
            self._tables[layer] = None

    @property
    def kept_layers(self) -> int:
        """Layers that keep keys and values."""
        return sum(table is not None for table in self._tables)

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
        memory = mixer.fold(*self.cached(layer, tokens)) if tokens else {}
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

    def release(self) -> None:
        """Frees everything."""
        for table in self._tables:
            if table is not None:
                self._arena.release(table)
        for slot in self._slots.values():
            self._arena.free_slot(slot)
        self._slots.clear()
        self._pages = 0
