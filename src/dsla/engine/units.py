"""Which units of a buffer are free: blocks of units, kept so that pages fill gaps and slots find whole blocks."""

from __future__ import annotations

from collections.abc import Sequence


class Units:
    """Free and used units, in blocks of `block_units`; units behind the last whole block are never part of a block.

    Args:
        n_units: units in all.
        block_units: units of a block, at least one.
    """

    def __init__(self, n_units: int, block_units: int) -> None:
        self._block_units = block_units
        n_blocks = n_units // block_units
        self.count = n_units
        self._free: dict[int, list[int]] = {}
        self._empty = list(range(n_blocks))[::-1]
        # Blocks with both free and used units, by number of used ones. Units missing from the tail count as used.
        self._partial: list[dict[int, None]] = [{} for _ in range(block_units)]
        self._tail = n_blocks
        tail_units = n_units - n_blocks * block_units
        if tail_units:
            self._free[self._tail] = list(range(n_units - tail_units, n_units))[::-1]
            self._partial[block_units - tail_units][self._tail] = None

    def take(self, count: int) -> list[int]:
        """Takes `count` free units, from the fullest blocks first; the caller knows that there are so many."""
        units: list[int] = []
        while len(units) < count:
            block = next((next(iter(group)) for group in reversed(self._partial) if group), None)
            if block is None:
                block = self._empty.pop()
                first = block * self._block_units
                self._free[block] = list(range(first, first + self._block_units))[::-1]
            else:
                del self._partial[self._block_units - len(self._free[block])][block]
            free = self._free[block]
            wanted = min(count - len(units), len(free))
            units += free[: -wanted - 1 : -1]
            del free[-wanted:]
            self._file(block)
        self.count -= count
        return units

    def give(self, units: Sequence[int]) -> None:
        """Frees units."""
        by_block: dict[int, list[int]] = {}
        for unit in units:
            by_block.setdefault(unit // self._block_units, []).append(unit)
        for block, freed in by_block.items():
            free = self._free.setdefault(block, [])
            if free:
                del self._partial[self._block_units - len(free)][block]
            free += reversed(freed)
            self._file(block)
        self.count += len(units)

    def take_block(self) -> int | None:
        """Takes an empty block; None = there is none, though free units may lie scattered over several."""
        if not self._empty:
            return None
        self.count -= self._block_units
        return self._empty.pop()

    def give_block(self, block: int) -> None:
        """Frees a block that `take_block` gave."""
        self._empty.append(block)
        self.count += self._block_units

    def clear_block(self) -> tuple[list[int], list[int]]:
        """Takes units elsewhere for all used units of the emptiest block, which is an empty one from then on.

        Returns:
            The block's used units and, as many, the units that take their place.
        """
        block = next(block for group in self._partial for block in group if block != self._tail)
        free = self._free.pop(block)
        del self._partial[self._block_units - len(free)][block]
        first = block * self._block_units
        used = sorted(set(range(first, first + self._block_units)) - set(free))
        targets = self.take(len(used))
        self._empty.append(block)
        self.count += len(used)
        return used, targets

    def _file(self, block: int) -> None:
        """Puts a block where `take` and `take_block` look for one with so many free units."""
        free = len(self._free[block])
        if free == self._block_units:
            del self._free[block]
            self._empty.append(block)
        elif free:
            self._partial[self._block_units - free][block] = None
        else:
            del self._free[block]
