"""Fold: the final states of a whole sequence at once, from keys and values that are already there."""

from __future__ import annotations

import torch
from torch import Tensor

from dsla.ops.shapes import check_kv, initial_states, sequence_lengths, state_dtype


def fold_kv(
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Final states of `chunk_dsla` without its outputs: `sum_i exp(sum of log_g after i) k_i^T v_i`.

    No loop over chunks is needed, and every exponent is <= 0.

    Args:
        k: keys `[B, T, G, K]`.
        v: values `[B, T, G, V]`.
        log_g: log gates `[B, T, S, G, K]` or `[B, T, S, G, 1]`, <= 0.
        initial_state: `[N, S, G, K, V]`. Default: zeros.
        cu_seqlens: `[N + 1]` bounds of packed sequences (B = 1). Default: B sequences of T tokens.

    Returns:
        States `[N, S, G, K, V]`, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: if shapes do not belong together.
    """
    check_kv(k, v, log_g)
    batch, tokens, groups, width = k.shape
    n_states, v_width = log_g.shape[2], v.shape[3]
    dtype = state_dtype(k.dtype)
    lengths = sequence_lengths(batch, tokens, cu_seqlens)
    start = initial_states(initial_state, (len(lengths), n_states, groups, width, v_width), k.to(dtype))
    if cu_seqlens is None:
        return _fold(k.to(dtype), v.to(dtype), log_g.to(dtype), start)
    pieces = zip(k.split(lengths, 1), v.split(lengths, 1), log_g.split(lengths, 1), start.split(1), strict=True)
    return torch.cat(
        [_fold(k_n.to(dtype), v_n.to(dtype), g_n.to(dtype), s_n) for k_n, v_n, g_n, s_n in pieces] or [start]
    )


def _fold(k: Tensor, v: Tensor, log_g: Tensor, start: Tensor) -> Tensor:
    if k.shape[1] == 0:
        return start
    # Summed from the end, so that the sums of recent tokens, the only ones that matter, are exact.
    from_here = log_g.flip(1).cumsum(1).flip(1)
    after = torch.cat([from_here[:, 1:], torch.zeros_like(from_here[:, :1])], 1).exp()
    if log_g.shape[-1] == 1:
        added = torch.einsum("btgk,btsgv->bsgkv", k, after * v.unsqueeze(2))
    else:
        added = torch.einsum("btsgk,btgv->bsgkv", after * k.unsqueeze(2), v)
    return torch.addcmul(added, start, from_here[:, 0].exp().unsqueeze(-1))
