"""Shape checks and packing arithmetic shared by the ops."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype states are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_kv(k: Tensor, v: Tensor, log_g: Tensor) -> None:
    """Checks that `k` `[B, T, G, K]`, `v` `[B, T, G, V]` and `log_g` `[B, T, S, G, K | 1]` belong together.

    Raises:
        ValueError: naming the tensor, its shape and the expected one.
    """
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k must be [B, T, G, K] and v [B, T, G, V] alike, found {tuple(k.shape)} and {tuple(v.shape)}"
        )
    batch, tokens, heads, width = k.shape
    if (
        log_g.dim() != 5
        or log_g.shape[:2] != (batch, tokens)
        or log_g.shape[3] != heads
        or log_g.shape[4] not in (1, width)
    ):
        raise ValueError(
            f"log_g must be [{batch}, {tokens}, S, {heads}, {width} or 1] to match k, found {tuple(log_g.shape)}"
        )


def check_q(q: Tensor, k: Tensor) -> None:
    """Checks that `q` `[B, T, H, K]` fits `k` `[B, T, G, K]`: same tokens and width, H a multiple of G.

    Raises:
        ValueError: naming both shapes.
    """
    fits = q.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0
    if not fits:
        raise ValueError(
            f"q must be [B, T, H, K] with k's B, T, K and H a multiple of G, found {tuple(q.shape)} for k {tuple(k.shape)}"
        )


def sequence_lengths(batch: int, tokens: int, cu_seqlens: Tensor | None) -> list[int]:
    """Lengths of the N sequences of a dense (`cu_seqlens` None) or packed batch.

    Raises:
        ValueError: if `cu_seqlens` is not `[N + 1]`, rising from 0 to T, or is given with B != 1.
    """
    if cu_seqlens is None:
        return [tokens] * batch
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if (
        batch != 1
        or cu_seqlens.dim() != 1
        or len(bounds) < 1
        or bounds[0] != 0
        or bounds[-1] != tokens
        or min(lengths, default=0) < 0
    ):
        raise ValueError(f"cu_seqlens must rise from 0 to T={tokens} with B=1, found B={batch} and {bounds}")
    return lengths


def initial_states(initial_state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`initial_state` checked against `shape` `[N, S, G, K, V]`, or zeros in the dtype and on the device of `like`.

    Raises:
        ValueError: if the given state has another shape.
    """
    if initial_state is None:
        return like.new_zeros(shape)
    if tuple(initial_state.shape) != shape:
        raise ValueError(f"initial_state must be {shape}, found {tuple(initial_state.shape)}")
    return initial_state.to(like.dtype)
