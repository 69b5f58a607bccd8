"""One buffer under one byte budget for everything requests remember: KV pages and state slots.

The buffer is cut into *units*. A unit holds one KV page: `page_tokens` tokens of one layer of one request. A state slot
(all fixed tensors of one converted layer of one request) takes one aligned *block* of as many units as it needs. Pages
and slots share all units: where free units lie scattered over several blocks, pages are moved until one block is empty,
so that every byte that is free can be used by either kind at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsla.engine.layout import Layout
from dsla.errors import EngineError
from dsla.mixers.base import StateSpec


class PageTable:
    """The pages of one layer of one request, in token order. Only the arena changes it (it may move pages)."""

    def __init__(self) -> None:
        self._units = np.empty(8, dtype=np.int64)
        self._address = self._units.ctypes.data
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def units(self) -> np.ndarray:
        """Unit of each page `[n_pages]`, int64. A view: valid until the table changes."""
        return self._units[: self._count]

    @property
    def address(self) -> int:
        """Where `units` starts in memory; valid as long as it."""
        return self._address

    def tensor(self) -> Tensor:
        """`units` as a tensor that shares its memory."""
        return torch.from_numpy(self.units)

    def append(self, units: Sequence[int]) -> None:
        end = self._count + len(units)
        if end > len(self._units):
            grown = np.empty(max(end, 2 * len(self._units)), dtype=np.int64)
            grown[: self._count] = self.units
            self._units, self._address = grown, grown.ctypes.data
        self._units[self._count : end] = units
        self._count = end

    def move(self, page: int, unit: int) -> None:
        self._units[page] = unit

    def clear(self) -> None:
        self._count = 0


class Arena:
    """The memory of all requests.

    Args:
        budget_bytes: bytes to hold, at most; rounded down to whole units and allocated once.
        kv: memory of a kept layer (`per_token` tensors), from the softmax mixer.
        slot: memory of a converted layer (`fixed` tensors), or None if no layer can be converted.
        page_tokens: tokens a KV page holds.
        device: where the buffer lives.
        poison: fill freed memory with NaN, so that any later read shows. For tests.

    Attributes:
        pages: name -> `[n_units, page_tokens, *per_token shape]`, views of the buffer.
        slots: name -> `[n_blocks, *fixed shape]`, views of the buffer.
        page_bytes: bytes of one page (one unit).
        slot_units: units of one slot; 1 where there are no slots.
        n_units: units in all.

    Raises:
        EngineError: if the budget does not hold a single page, or `page_tokens` is not positive.
    """

    def __init__(
        self,
        budget_bytes: int,
        kv: StateSpec,
        slot: StateSpec | None = None,
        *,
        page_tokens: int = 16,
        device: torch.device | str = "cpu",
        poison: bool = False,
    ) -> None:
        if page_tokens < 1:
            raise EngineError(f"page_tokens must be at least 1, found {page_tokens}")
        page = Layout({name: (page_tokens, *spec.shape) for name, spec in kv.per_token.items()}, kv.per_token)
        block = Layout({name: spec.shape for name, spec in slot.fixed.items()}, slot.fixed) if slot else None
        self.page_tokens, self.page_bytes, self.poison = page_tokens, page.nbytes, poison
        self.slot_units = -(-block.nbytes // page.nbytes) if block else 1
        self.n_units = budget_bytes // page.nbytes
        if self.n_units < 1:
            raise EngineError(
                f"the memory budget of {budget_bytes:,} bytes does not hold one KV page of {page.nbytes:,} bytes: "
                "raise the budget or lower page_tokens"
            )
        self.device = torch.device(device)
        try:
            self._buffer = torch.empty(self.n_units * page.nbytes, dtype=torch.uint8, device=self.device)
        except RuntimeError:
            raise EngineError(
                f"{budget_bytes:,} bytes for requests cannot be had here: give a smaller budget"
            ) from None
        if poison:
            self._buffer.fill_(0xFF)
        n_blocks = self.n_units // self.slot_units
        self.pages = page.views(self._buffer, self.n_units, page.nbytes)
        self.slots = block.views(self._buffer, n_blocks, self.slot_units * page.nbytes) if block else {}
        self._unit_bytes = self._buffer.view(self.n_units, page.nbytes)

        self._owners: dict[int, tuple[PageTable, int]] = {}
        self._slots_in_use: set[int] = set()
        self._free: dict[int, list[int]] = {}
        self._empty = list(range(n_blocks))[::-1]
        # Blocks with both free and used units, by number of used ones. Units missing from the tail count as used.
        self._partial: list[dict[int, None]] = [{} for _ in range(self.slot_units)]
        self._tail = n_blocks
        tail_units = self.n_units - n_blocks * self.slot_units
        if tail_units:
            self._free[self._tail] = list(range(self.n_units - tail_units, self.n_units))[::-1]
            self._partial[self.slot_units - tail_units][self._tail] = None

    @property
    def budget_bytes(self) -> int:
        """Bytes of all units."""
        return self.n_units * self.page_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages in use."""
        return len(self._owners) * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the slots in use."""
        return len(self._slots_in_use) * self.slot_units * self.page_bytes

    @property
    def free_units(self) -> int:
        """Units neither a page nor a slot uses; all of them can be allocated as either."""
        return self.n_units - len(self._owners) - len(self._slots_in_use) * self.slot_units

    def page_count(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one layer need."""
        return -(-tokens // self.page_tokens)

    def extend(self, table: PageTable, count: int) -> None:
        """Appends `count` pages to `table`; their contents are undefined.

        Raises:
            EngineError: if fewer than `count` units are free; nothing has changed then.
        """
        self._require(count, "KV pages")
        first = len(table)
        units = self._take(count)
        table.append(units)
        for page, unit in enumerate(units, first):
            self._owners[unit] = (table, page)

    def release(self, table: PageTable) -> None:
        """Frees all pages of `table` and empties it."""
        units = table.units.tolist()
        for unit in units:
            del self._owners[unit]
        self._give(units)
        if self.poison and units:
            self._unit_bytes[table.tensor().to(self.device)] = 0xFF
        table.clear()

    def allocate_slot(self) -> int:
        """A zeroed slot: a row of every tensor in `slots`. Pages may move to make room.

        Raises:
            EngineError: if fewer than `slot_units` units are free, or the arena has no slots.
        """
        if not self.slots:
            raise EngineError("this arena has no state slots: it was made for a model without converted layers")
        self._require(self.slot_units, "a state slot")
        if not self._empty:
            self._evacuate()
        block = self._empty.pop()
        self._slots_in_use.add(block)
        self._block_bytes(block).zero_()
        return block

    def free_slot(self, slot: int) -> None:
        """Frees a slot.

        Raises:
            EngineError: if the slot is not in use.
        """
        if slot not in self._slots_in_use:
            raise EngineError(f"state slot {slot} is not in use")
        self._slots_in_use.remove(slot)
        self._empty.append(slot)
        if self.poison:
            self._block_bytes(slot).fill_(0xFF)

    def _require(self, units: int, purpose: str) -> None:
        if units > self.free_units:
            raise EngineError(
                f"{units * self.page_bytes:,} bytes wanted for {purpose}, "
                f"{self.free_units * self.page_bytes:,} of {self.budget_bytes:,} are free"
            )

    def _block_bytes(self, block: int) -> Tensor:
        return self._unit_bytes[block * self.slot_units : (block + 1) * self.slot_units]

    def _take(self, count: int) -> list[int]:
        """Takes `count` free units, from the fullest blocks first."""
        units: list[int] = []
        while len(units) < count:
            block = next((next(iter(group)) for group in reversed(self._partial) if group), None)
            if block is None:
                block = self._empty.pop()
                first = block * self.slot_units
                self._free[block] = list(range(first, first + self.slot_units))[::-1]
            else:
                del self._partial[self.slot_units - len(self._free[block])][block]
            free = self._free[block]
            wanted = min(count - len(units), len(free))
            units += free[: -wanted - 1 : -1]
            del free[-wanted:]
            self._file(block)
        return units

    def _give(self, units: Sequence[int]) -> None:
        by_block: dict[int, list[int]] = {}
        for unit in units:
            by_block.setdefault(unit // self.slot_units, []).append(unit)
        for block, freed in by_block.items():
            free = self._free.setdefault(block, [])
            if free:
                del self._partial[self.slot_units - len(free)][block]
            free += reversed(freed)
            self._file(block)

    def _file(self, block: int) -> None:
        """Puts a block where `_take` and `allocate_slot` look for one with so many free units."""
        free = len(self._free[block])
        if free == self.slot_units:
            del self._free[block]
            self._empty.append(block)
        elif free:
            self._partial[self.slot_units - free][block] = None
        else:
            del self._free[block]

    def _evacuate(self) -> None:
        """Moves the pages of the least filled block elsewhere, so that it becomes empty."""
        candidates = (block for group in self._partial for block in group if block != self._tail)
        block = next(candidates)
        free = self._free.pop(block)
        del self._partial[self.slot_units - len(free)][block]
        first = block * self.slot_units
        used = sorted(set(range(first, first + self.slot_units)) - set(free))
        targets = self._take(len(used))
        device = self.device
        source = torch.tensor(used, device=device)
        self._unit_bytes[torch.tensor(targets, device=device)] = self._unit_bytes[source]
        for unit, target in zip(used, targets, strict=True):
            table, page = self._owners.pop(unit)
            table.move(page, target)
            self._owners[target] = (table, page)
        if self.poison:
            self._unit_bytes[source] = 0xFF
        self._empty.append(block)
