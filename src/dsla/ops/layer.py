"""What a decoder layer does beside mixing, on packed weights: to the bit what its steps one by one give, in a call each."""

from __future__ import annotations

import torch
from torch import Tensor

from dsla.ops.cpu import Weight, native
from dsla.ops.linear import linear_packed, multiply
from dsla.ops.rows import rms_norm, rotate, silu_mul

Delta = tuple[Tensor, Tensor]
"""A low-rank delta `up(down(x))`: panels of both, from `dsla.ops.linear.pack`."""


def project(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Weight,
    heads: int,
    groups: int,
    cos: Tensor,
    sin: Tensor,
    delta: Delta | None,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """What attention reads: queries, keys and values of normed rows, the first two rotated.

    Args:
        x: `[n, width]` bf16.
        norm: `[width]` bf16, of an RMS norm.
        eps: of the norm.
        weight: of queries, keys and values.
        heads: query heads H.
        groups: KV heads G.
        cos: `[n, R]` of each row's position, as for `rotate`.
        sin: likewise.
        delta: added to queries of some rows before they are rotated; None = of none.
        rows: those rows.

    Returns:
        The normed rows `[n, width]`, and `[n, H + 2 G, D]`: queries, keys, values.
    """
    kernels = native(x)
    if kernels is not None:
        return kernels.project(x.contiguous(), norm, eps, weight, heads, groups, cos, sin, delta, rows)
    normed = rms_norm(x, norm, eps)
    y = multiply(normed, weight).unflatten(1, (heads + 2 * groups, -1))
    if delta is not None:
        add_low_rank(normed[rows], *delta, y[rows, :heads].flatten(1))
    return normed, torch.cat([rotate(y[:, : heads + groups], cos, sin), y[:, heads + groups :]], 1)


def add_attended(x: Tensor, attended: Tensor, weight: Weight, delta: Delta | None, rows: slice) -> Tensor:
    """`x + (attended weight^T + bias + delta)`: what attention adds to a layer's input.

    Args:
        x: `[n, width]` bf16.
        attended: `[n, k]` bf16.
        weight: of the output projection.
        delta: added on some rows; None = on none.
        rows: those rows.

    Returns:
        `[n, width]` bf16.
    """
    kernels = native(x)
    if kernels is not None:
        return kernels.add_attended(x.contiguous(), attended.contiguous(), weight, delta, rows)
    out = multiply(attended, weight)
    if delta is not None:
        add_low_rank(attended[rows], *delta, out[rows])
    return x + out


def add_low_rank(x: Tensor, down: Tensor, up: Tensor, y: Tensor) -> None:
    """Adds `up(down(x))` to `y` in place.

    Args:
        x: `[n, k]` bf16.
        down: a weight of few outputs, from `dsla.ops.linear.pack`.
        up: the weight from those to n_out, likewise.
        y: `[n, n_out]` bf16.
    """
    kernels = native(x)
    if kernels is None or y.stride(1) != 1:
        y += linear_packed(linear_packed(x, down), up)
    else:
        kernels.add_low_rank(x.contiguous(), down, up, y)


def add_swiglu(x: Tensor, norm: Tensor, eps: float, up: Weight, down: Weight) -> Tensor:
    """`x + down(silu_mul(up(rms_norm(x))))`: what follows attention in a layer.

    Args:
        x: `[n, width]` bf16.
        norm: `[width]` bf16.
        eps: of the norm.
        up: of gate, then up; without bias, as `down`.
        down: of what is added, kept in the same form.

    Returns:
        `[n, width]` bf16.
    """
    kernels = native(x)
    if kernels is not None:
        return kernels.add_swiglu(x.contiguous(), norm, eps, up, down)
    return x + multiply(silu_mul(multiply(rms_norm(x, norm, eps), up)), down)
