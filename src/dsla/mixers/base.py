"""The words mixers and their hosts share: the shape of an attention layer, and what memory a mixer needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Memory = dict[str, Tensor]
"""A mixer's fixed-size memory of N requests: name -> `[N, *shape]`, names and shapes as in `StateSpec.fixed`."""


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention layer: `hidden_size`, `n_heads` (H), `n_kv_heads` (G), `head_dim` (D)."""

    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class TensorSpec:
    """Shape (without the request axis) and dtype of one tensor of a mixer's memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StateSpec:
    """Memory of one layer and request: `per_token` tensors grow with the context, `fixed` ones do not."""

    per_token: dict[str, TensorSpec]
    fixed: dict[str, TensorSpec]

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.nbytes for spec in self.per_token.values())

    @property
    def fixed_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.fixed.values())

    @property
    def window_bytes(self) -> int:
        """Bytes of the fixed tensors that keep keys and values as they are: window and sinks, all but `states`."""
        return sum(spec.nbytes for name, spec in self.fixed.items() if name != "states")

    def zeros(self, n: int, device: torch.device | str = "cpu") -> Memory:
        """Empty memory of `n` requests: every fixed tensor as zeros `[n, *shape]`."""
        return {name: torch.zeros(n, *spec.shape, dtype=spec.dtype, device=device) for name, spec in self.fixed.items()}
