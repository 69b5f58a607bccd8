"""The pages of one layer of one request or snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class PageTable:
    """Pages in token order. Only the arena changes it: it may move pages, and pages may be in several tables.

    Args:
        live: whether a running request needs its pages; those that only tables without that flag hold can be had back.
    """

    def __init__(self, live: bool = True) -> None:
        self.live = live
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

    def append(self, units: Sequence[int] | np.ndarray) -> None:
        end = self._count + len(units)
        if end > len(self._units):
            grown = np.empty(max(end, 2 * len(self._units)), dtype=np.int64)
            grown[: self._count] = self.units
            self._units, self._address = grown, grown.ctypes.data
        self._units[self._count : end] = units
        self._count = end

    def truncate(self, pages: int) -> None:
        self._count = pages
