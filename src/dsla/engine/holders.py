"""Which tables hold pages in which block, so that pages that move are told to those alone that hold them."""

from __future__ import annotations

from collections.abc import ItemsView

import numpy as np

from dsla.engine.pages import PageTable


class Holders:
    """The tables of every block, with the number of pages each has there.

    Args:
        block_units: units of a block.
    """

    def __init__(self, block_units: int) -> None:
        self._block_units = block_units
        self._tables: dict[int, dict[PageTable, int]] = {}

    def add(self, table: PageTable, units: np.ndarray) -> None:
        """`table` has got these units."""
        for block, count in self._per_block(units):
            tables = self._tables.setdefault(block, {})
            tables[table] = tables.get(table, 0) + count

    def remove(self, table: PageTable, units: np.ndarray) -> None:
        """`table` has lost these units."""
        for block, count in self._per_block(units):
            tables = self._tables[block]
            tables[table] -= count
            if not tables[table]:
                del tables[table]
            if not tables:
                del self._tables[block]

    def move(self, used: list[int], targets: list[int]) -> None:
        """All used units of one block have moved, each to the one of `targets` at its place: tables name those from now on."""
        block = used[0] // self._block_units
        first = block * self._block_units
        place = np.full(self._block_units, -1, dtype=np.int64)
        place[np.array(used) - first] = targets
        for table in self._tables.pop(block):
            units = table.units
            hit = (units >= first) & (units < first + self._block_units)
            moved = place[units[hit] - first]
            units[hit] = moved
            self.add(table, moved)

    def _per_block(self, units: np.ndarray) -> ItemsView[int, int]:
        counts: dict[int, int] = {}
        for unit in units.tolist():
            block = unit // self._block_units
            counts[block] = counts.get(block, 0) + 1
        return counts.items()
