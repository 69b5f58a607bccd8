"""One buffer under one byte budget for everything requests remember: KV pages, state slots, and snapshots of both.

The buffer is cut into *units*. A unit holds one KV page: `page_tokens` tokens of one layer. A state slot (all fixed
tensors of one converted layer) takes one aligned *block* of as many units as it needs. Pages and slots share all units:
where free units lie scattered over several blocks, pages are moved until one block is empty, so that every byte that is
free can be used by either kind at once.

Pages can be in several tables. What running requests need is *live*; what is only kept for requests to come can be had
back at any time, and counts as free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dsla.engine.holders import Holders
from dsla.engine.layout import Layout
from dsla.engine.pages import PageTable
from dsla.engine.units import Units
from dsla.errors import EngineError
from dsla.mixers.base import StateSpec


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
        reclaim: called with a number of units when so many more are needed than are unused; it must free some memory that
            is not live, or raise. Set by whoever keeps such memory.

    Raises:
        EngineError: if the budget cannot be had, or `page_tokens` is not positive.
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
        self._window_bytes = slot.window_bytes if slot else 0
        self.n_units = max(budget_bytes, 0) // page.nbytes
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

        self.reclaim: Callable[[int], None] | None = None
        self._unused = Units(self.n_units, self.slot_units)
        # Pages only move to make room for slots of several units.
        self._tables = Holders(self.slot_units) if self.slot_units > 1 else None
        self._slots: dict[int, bool] = {}
        # Per unit: how many tables hold it as a page, and how many of them are live.
        self._holders = np.zeros(self.n_units, dtype=np.int32)
        self._live = np.zeros(self.n_units, dtype=np.int32)
        self._live_pages = self._live_slots = 0

    @property
    def budget_bytes(self) -> int:
        """Bytes of all units."""
        return self.n_units * self.page_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live pages; one that several requests share counts once."""
        return self._live_pages * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the live slots."""
        return self._live_slots * self.slot_units * self.page_bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of those that hold windows and sinks; the rest of them are states, and what slots are rounded up by."""
        return self._live_slots * self._window_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes in use that are not live."""
        return (self.free_units - self._unused.count) * self.page_bytes

    @property
    def free_units(self) -> int:
        """Units that are unused or not live; all of them can be allocated as pages or slots."""
        return self.n_units - self._live_pages - self._live_slots * self.slot_units

    @property
    def unused_units(self) -> int:
        """Units that can be allocated without `reclaim`."""
        return self._unused.count

    def page_count(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one layer need."""
        return -(-tokens // self.page_tokens)

    def extend(self, table: PageTable, count: int) -> None:
        """Appends `count` pages to `table`; their contents are undefined.

        Raises:
            EngineError: if fewer than `count` units are free; nothing has changed then.
        """
        if count:
            self._require(count, "KV pages")
            self._hold(table, np.array(self._unused.take(count), dtype=np.int64))

    def share(self, table: PageTable, source: PageTable, pages: int) -> None:
        """Appends the first `pages` pages of `source` to `table`, which is empty; both hold them from then on."""
        if pages:
            self._hold(table, source.units[:pages])

    def truncate(self, table: PageTable, pages: int) -> None:
        """Takes all but the first `pages` pages out of `table`; those nobody else holds are unused then."""
        units = table.units[pages:]
        if not len(units):
            return
        self._holders[units] -= 1
        if table.live:
            self._live[units] -= 1
            self._live_pages -= int((self._live[units] == 0).sum())
        freed = units[self._holders[units] == 0]
        self._unused.give(freed.tolist())
        if self.poison:
            self._unit_bytes[torch.from_numpy(freed).to(self.device)] = 0xFF
        if self._tables is not None:
            self._tables.remove(table, units)
        table.truncate(pages)

    def release(self, table: PageTable) -> None:
        """Takes all pages out of `table`."""
        self.truncate(table, 0)

    def retire(self, table: PageTable) -> None:
        """The pages of `table` are not live any more, as far as it is concerned."""
        self._live[table.units] -= 1
        self._live_pages -= int((self._live[table.units] == 0).sum())
        table.live = False

    def live_pages(self, tables: Sequence[PageTable], pages: int) -> int:
        """How many of the first `pages` pages of each of some tables are live."""
        units = [table.units[:pages] for table in tables]
        return int((self._live[np.concatenate(units)] > 0).sum()) if units else 0

    def exclusive_pages(self, table: PageTable) -> int:
        """How many pages no live table but `table` holds."""
        return int((self._live[table.units] == 1).sum())

    def copy_pages(self, sources: list[tuple[PageTable, int]], targets: list[tuple[PageTable, int]]) -> None:
        """Copies pages, given as `(table, place in it)`; sources and targets are as many."""
        source, target = (
            torch.tensor([int(table.units[page]) for table, page in pairs], device=self.device)
            for pairs in (sources, targets)
        )
        self._unit_bytes[target] = self._unit_bytes[source]

    def page_data(self, table: PageTable) -> Tensor:
        """The bytes of all pages of `table`, `[n_pages, page_bytes]` uint8: a copy."""
        return self._unit_bytes[table.tensor().to(self.device)]

    def set_page_data(self, table: PageTable, data: Tensor) -> None:
        """Writes what `page_data` gave."""
        self._unit_bytes[table.tensor().to(self.device)] = data.to(self.device)

    def allocate_slot(self, live: bool = True) -> int:
        """A zeroed slot: a row of every tensor in `slots`. Pages may move to make room.

        Args:
            live: whether a running request needs it.

        Raises:
            EngineError: if fewer than `slot_units` units are free, or the arena has no slots.
        """
        if not self.slots:
            raise EngineError("this arena has no state slots: it was made for a model without converted layers")
        self._require(self.slot_units, "a state slot")
        block = self._unused.take_block()
        if block is None:
            self._move(*self._unused.clear_block())
            block = self._unused.take_block()
            assert block is not None
        self._slots[block] = live
        self._live_slots += live
        self.slot_data(block).zero_()
        return block

    def free_slot(self, slot: int) -> None:
        """Frees a slot.

        Raises:
            EngineError: if the slot is not in use.
        """
        self.set_slot_live(slot, False)
        del self._slots[slot]
        self._unused.give_block(slot)
        if self.poison:
            self.slot_data(slot).fill_(0xFF)

    def set_slot_live(self, slot: int, live: bool) -> None:
        """Whether a running request needs a slot.

        Raises:
            EngineError: if the slot is not in use.
        """
        if slot not in self._slots:
            raise EngineError(f"state slot {slot} is not in use")
        self._live_slots += live - self._slots[slot]
        self._slots[slot] = live

    def slot_data(self, slot: int) -> Tensor:
        """The bytes of a slot, `[slot_units, page_bytes]` uint8: a view."""
        return self._unit_bytes[slot * self.slot_units : (slot + 1) * self.slot_units]

    def _hold(self, table: PageTable, units: np.ndarray) -> None:
        table.append(units)
        if self._tables is not None:
            self._tables.add(table, units)
        self._holders[units] += 1
        if table.live:
            self._live_pages += int((self._live[units] == 0).sum())
            self._live[units] += 1

    def _require(self, units: int, purpose: str) -> None:
        if units > self.free_units:
            raise EngineError(
                f"{units * self.page_bytes:,} bytes wanted for {purpose}, "
                f"{self.free_units * self.page_bytes:,} of {self.budget_bytes:,} are free"
            )
        while self._unused.count < units:
            if self.reclaim is None:
                raise EngineError("memory that is not live is kept, and nobody gives it back: this is a bug in dsla")
            self.reclaim(units - self._unused.count)

    def _move(self, used: list[int], targets: list[int]) -> None:
        """Moves pages, and tells all tables that hold them."""
        source, target = torch.tensor(used, device=self.device), torch.tensor(targets, device=self.device)
        self._unit_bytes[target] = self._unit_bytes[source]
        if self.poison:
            self._unit_bytes[source] = 0xFF
        for counts in (self._holders, self._live):
            counts[targets] = counts[used]
            counts[used] = 0
        if self._tables is not None:
            self._tables.move(used, targets)
