"""Products with a weight matrix: in its own dtype, or in four bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla.ops.cpu import Weight, native

GROUP, LANES = 32, 16


def fits(weight: Tensor) -> bool:
    """Whether a weight `[n_out, k]` can be packed."""
    return weight.shape[0] % LANES == 0 and weight.shape[1] % GROUP == 0


def linear_packed(x: Tensor, panels: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`.

    Args:
        x: `[n, k]` bf16.
        panels: the weight, from `pack`.
        bias: `[n_out]` bf16, or None.

    Returns:
        `[n, n_out]` bf16.
    """
    kernels = native(x)
    if kernels is None:
        return F.linear(x, unpack(panels), bias)
    return kernels.linear(x.contiguous(), panels, bias)


def linear_int4(x: Tensor, panels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with a weight from `pack_int4`."""
    kernels = native(x)
    if kernels is None:
        return F.linear(x, unpack_int4(panels).to(x.dtype), bias)
    return kernels.linear_int4(x.contiguous(), panels, bias)


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """`x weight^T + bias` `[n, n_out]` bf16 of `x` `[n, k]` bf16."""
    return (linear_int4 if weight.int4 else linear_packed)(x, weight.panels, weight.bias)


def pack(weight: Tensor) -> Tensor:
    """A weight `[n_out, k]` bf16, n_out a multiple of 16, k of 32, as panels `[n_out / 16, k / 2, 16]` int32."""
    words: Tensor = weight.contiguous().view(torch.int32)
    panels: Tensor = words.unflatten(0, (-1, LANES)).transpose(1, 2)
    return panels.contiguous()


def unpack(panels: Tensor) -> Tensor:
    """The weight `[n_out, k]` bf16 that `panels` hold."""
    rows_first: Tensor = panels.transpose(1, 2).flatten(0, 1).contiguous()
    return rows_first.view(torch.bfloat16)


def rows(panels: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[n]` of the weight that `panels` hold, `[n, k]` bf16."""
    chosen: Tensor = panels[index // LANES, :, index % LANES]
    return chosen.view(torch.bfloat16)


def pack_int4(weight: Tensor) -> Tensor:
    """Rounds a weight to sixteen evenly spaced values from the least to the greatest of each 32 inputs of an output.

    The same values a Q4_1 file holds: weights that come from one stay what they are, up to the rounding of scale and offset.

    Args:
        weight: `[n_out, k]`, n_out a multiple of 16, k of 32.

    Returns:
        `[n_out / 16, k / 32, 5, 16]` int32, 5 bits a weight; the layout is described in `linear.cpp`.
    """
    n_out, k = weight.shape
    # [panels, groups, 16 outputs, 32 inputs]
    grouped = weight.float().view(n_out // LANES, LANES, k // GROUP, GROUP).transpose(1, 2)
    low = grouped.amin(-1).bfloat16().float()
    scale = ((grouped.amax(-1) - low) / 15).bfloat16().float()
    bits = ((grouped - low.unsqueeze(-1)) / scale.clamp_min(1e-30).unsqueeze(-1)).round().clamp(0, 15).int()
    # [panels, groups, 16, 4 quarters, 4 pairs, 2] -> words [panels, groups, 4, 16]
    bits = bits.unflatten(-1, (4, 4, 2))
    shifts = 4 * torch.arange(4).view(4, 1) + 16 * torch.arange(2)
    words = (bits.long() << shifts).sum((-1, -2)).transpose(2, 3)
    halves = torch.stack([scale.bfloat16(), low.bfloat16()], 2).view(torch.int16)
    packed = halves.flatten(2).view(torch.int32).unsqueeze(2)
    return torch.cat([words.to(torch.uint32).view(torch.int32), packed], 2).contiguous()


def unpack_int4(panels: Tensor) -> Tensor:
    """The weight `[n_out, k]` fp32 that `panels` stand for."""
    words = panels[:, :, :4].transpose(2, 3).long()
    shifts = 4 * torch.arange(4, device=panels.device).view(4, 1) + 16 * torch.arange(2, device=panels.device)
    bits = ((words[..., None, None] >> shifts) & 15).flatten(3)
    halves = panels[:, :, 4].contiguous().view(torch.bfloat16).unflatten(-1, (2, LANES)).float()
    scale, low = halves.unbind(2)
    weight: Tensor = bits * scale.unsqueeze(-1) + low.unsqueeze(-1)
    return weight.transpose(1, 2).reshape(len(panels) * LANES, -1)
