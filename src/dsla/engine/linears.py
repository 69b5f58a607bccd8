"""Projections of the decoder, in the forms their weights are kept in; all give `x weight^T + bias`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla.mixers.dsla import LowRank
from dsla.ops.cpu import Weight, native
from dsla.ops.layer import add_low_rank
from dsla.ops.linear import fits, multiply, pack, pack_int4, rows


@dataclass(frozen=True)
class Linear:
    """Weight `[n_out, n_in]` and bias `[n_out]` (or None)."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` `[n]` of the weight, `[n, n_in]`."""
        return F.embedding(index, self.weight)


@dataclass(frozen=True)
class Packed:
    """A weight as panels, and bias `[n_out]` (or None)."""

    panels: Tensor
    bias: Tensor | None = None

    @cached_property
    def weight(self) -> Weight:
        """Both, as the CPU kernels take them."""
        return Weight(self.panels, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight)


class PackedLinear(Packed):
    """A bf16 weight as panels for the CPU kernels (`dsla.ops.linear.pack`)."""

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` `[n]` of the weight, `[n, n_in]`."""
        return rows(self.panels, index)


class Int4Linear(Packed):
    """A weight rounded to four bits in groups of 32 inputs (`dsla.ops.linear.pack_int4`)."""


Projection = Linear | PackedLinear | Int4Linear
Embedding = Linear | PackedLinear


@dataclass(frozen=True)
class PackedDelta:
    """A low-rank delta `up(down(x))` for the CPU kernels, both as panels (`dsla.ops.linear.pack`)."""

    down: Tensor
    up: Tensor

    @property
    def panels(self) -> tuple[Tensor, Tensor]:
        """Both, as the CPU kernels take them."""
        return self.down, self.up

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Adds it to rows `y` `[n, n_out]`, of `x` `[n, n_in]`."""
        add_low_rank(x, self.down, self.up, y)


@dataclass(frozen=True)
class PlainDelta:
    """A low-rank delta as it is, computed in its own dtype."""

    low_rank: LowRank

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Adds it to rows `y` `[n, n_out]`, of `x` `[n, n_in]`."""
        y += self.low_rank(x)


Delta = PlainDelta | PackedDelta


def packed(linear: Linear) -> Linear | PackedLinear:
    """`linear` in the form the CPU kernels read fastest; itself where they do not compute on it."""
    if native(linear.weight) is None or not fits(linear.weight):
        return linear
    return PackedLinear(pack(linear.weight), linear.bias)


def rounded_to_int4(linear: Linear) -> Linear | PackedLinear | Int4Linear:
    """`linear` in four bits; packed only where its shape is not a whole number of groups."""
    if not fits(linear.weight):
        return packed(linear)
    return Int4Linear(pack_int4(linear.weight), linear.bias)


def packed_delta(delta: LowRank, dtype: torch.dtype) -> Delta:
    """A low-rank delta in the form the CPU kernels read fastest; as it is where they do not compute on it.

    Args:
        delta: the delta.
        dtype: of what it is given.
    """
    down, up = delta.down.detach().to(dtype), delta.up.detach().to(dtype)
    if native(down) is None or not len(down) or not (fits(down) and fits(up)):
        return PlainDelta(delta)
    return PackedDelta(pack(down), pack(up))
