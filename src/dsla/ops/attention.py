"""Softmax attention as the kept layers and the exact local window need it; grouped KV heads are never repeated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of one sequence whose queries are its last T positions.

    Args:
        q: queries `[T, H, D]` of the last T of n positions.
        k: keys `[n, G, D]`.
        v: values `[n, G, D]`.

    Returns:
        `[T, H, D]` in q's dtype.
    """
    tokens, heads, _ = q.shape
    n, groups, _ = k.shape
    keys, values = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    if tokens == 1:
        # The query heads of a group become the rows of one small matrix, so K and V are read once.
        grouped = q.view(groups, heads // groups, -1).unsqueeze(0)
        return F.scaled_dot_product_attention(grouped, keys, values).view(1, heads, -1)
    queries = q.transpose(0, 1).unsqueeze(0)
    if tokens == n:
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=heads != groups)
    else:
        mask = torch.ones(tokens, n, dtype=torch.bool, device=q.device).tril(n - tokens)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=heads != groups)
    return y.squeeze(0).transpose(0, 1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    sinks_k: Tensor,
    sinks_v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the last W tokens and the first C tokens ("sinks") of each sequence.

    Args:
        q: queries `[B, T, H, D]` of positions `lengths ... lengths + T - 1`.
        k: keys `[B, W + T, G, D]`: the W tokens before the first query, then its own T (rows of positions < 0 are ignored).
        v: values, as `k`.
        lengths: tokens before the first query, `[B]` int64.
        sinks_k: keys of positions 0 ... C-1, `[B, C, G, D]`; a position counts once it has left the window.
        sinks_v: values, as `sinks_k`.

    Returns:
        `y` `[B, T, H, D]`, normalised over window and sinks, and the log of the normaliser `lse` `[B, T, H]`;
        both fp32 (fp64 for fp64 inputs).
    """
    batch, tokens, heads, dim = q.shape
    groups, window, n_sinks = k.shape[2], k.shape[1] - tokens, sinks_k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    size = min(BLOCK, tokens)
    blocks = -(-tokens // size)
    padding = blocks * size - tokens
    q = F.pad(q, (0, 0, 0, 0, 0, padding)) * dim**-0.5
    k, v = F.pad(k, (0, 0, 0, 0, 0, padding)), F.pad(v, (0, 0, 0, 0, 0, padding))

    # [B, blocks, G, R * size, D] against [B, blocks, G, D, size + W + C]
    queries = q.view(batch, blocks, size, groups, -1, dim).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    keys, values = (
        torch.cat(
            [x.unfold(1, size + window, size), far.permute(0, 2, 3, 1).unsqueeze(1).expand(-1, blocks, -1, -1, -1)], -1
        )
        for x, far in ((k, sinks_k), (v, sinks_v))
    )
    row = torch.arange(size, device=q.device).unsqueeze(1)
    column = torch.arange(size + window, device=q.device).unsqueeze(0)
    inside = (column > row) & (column <= row + window)
    block_start = lengths.view(-1, 1) + torch.arange(blocks, device=q.device) * size
    exists = block_start.unsqueeze(-1) - window + column >= 0
    position = block_start.view(batch, blocks, 1, 1) + row
    left = torch.arange(n_sinks, device=q.device) <= position - window
    allowed = torch.cat([inside.view(1, 1, size, -1) & exists.unsqueeze(2), left], -1).view(
        batch, blocks, 1, 1, size, -1
    )
    scores = (queries @ keys).to(dtype).unflatten(3, (-1, size)).masked_fill(~allowed, -torch.inf)
    weights, lse = _Softmax.apply(scores)
    y = weights.flatten(3, 4).to(v.dtype) @ values.transpose(-1, -2)
    y = y.to(dtype).unflatten(3, (-1, size)).permute(0, 1, 4, 2, 3, 5).reshape(batch, blocks * size, heads, dim)
    lse = lse.permute(0, 1, 4, 2, 3).reshape(batch, blocks * size, heads)
    return y[:, :tokens], lse[:, :tokens]


class _Softmax(torch.autograd.Function):
    """Softmax over the last dim and the log of its normaliser, in fewer passes than from their own backwards."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp_()
        ctx.save_for_backward(weights)
        return weights, lse.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        of_weights, of_lse = grads
        shift = of_lse.unsqueeze(-1) - torch.linalg.vecdot(of_weights, weights).unsqueeze(-1)
        of_scores: Tensor = (of_weights + shift).mul_(weights)
        return of_scores
