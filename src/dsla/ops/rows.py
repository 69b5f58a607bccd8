"""What a step does to each of its rows: norm, gated activation, rotation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla.ops.cpu import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm (arXiv 1910.07467), in fp32 at least.

    Args:
        x: `[..., n]`.
        weight: `[n]` in x's dtype.
        eps: added to the mean square.

    Returns:
        `[..., n]` in x's dtype.
    """
    kernels = native(x)
    if kernels is not None and x.is_contiguous():
        return kernels.rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` `[T, n]` of rows `[T, 2 n]` that hold gate, then up (SwiGLU, arXiv 2002.05202)."""
    kernels = native(x)
    if kernels is not None and x.is_contiguous():
        return kernels.silu_mul(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout (arXiv 2104.09864, as Hugging Face stores it).

    Args:
        x: heads `[..., n_heads, D]`.
        cos: `[..., R]` of each token, in x's dtype; dims from R on are not rotated.
        sin: as `cos`.

    Returns:
        `[..., n_heads, D]`.
    """
    kernels = native(x)
    if kernels is not None and x.dim() == 3 and x[0].is_contiguous() and cos.is_contiguous() and sin.is_contiguous():
        return kernels.rotate(x, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = x.tensor_split([cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
