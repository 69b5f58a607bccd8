"""How the reads of the states and the exact local attention become one output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsla.mixers.config import DslaConfig

_TINY = 1e-30
_MAX_LOG_WEIGHT = 30.0


class Mixing(nn.Module):
    """Weighs the parts of a converted layer, per layer, per head, or per head and query.

    With `normalizer: shared` a state's weight is the log of a positive factor on its sums; window, sinks and states are then
    divided by one common sum, which is softmax attention's own form. With `state` and `none` the weights are convex.

    Args:
        config: the mixer's settings.
        heads: H.
        dim: head dim D.
        width: feature width F.
    """

    def __init__(self, config: DslaConfig, heads: int, dim: int, width: int) -> None:
        super().__init__()
        self.config = config
        parts = config.n_states + (config.normalizer == "state" and config.attends_locally)
        # Features that carry no information meet with weight 1 / F: start as a mean over the tokens the states hold.
        start = math.log(width / config.n_states) if config.normalizer == "shared" else 0.0
        self.bias = nn.Parameter(torch.full((1 if config.mixing == "layer" else heads, parts), start))
        self.weight = nn.Parameter(torch.zeros(heads, dim, parts)) if config.mixing == "query" else None

    def forward(
        self,
        q: Tensor,
        reads: Tensor,
        local: tuple[Tensor, Tensor] | None,
        states_off: frozenset[int] = frozenset(),
    ) -> Tensor:
        """The output of the layer's heads.

        Args:
            q: queries `[B, T, H, D]`.
            reads: reads of the states `[B, T, S, H, V]`; with a normaliser, the last column holds the sum of weights.
            local: output `[B, T, H, D]` and log normaliser `[B, T, H]` of window and sinks, or None.
            states_off: states whose reads are left out, as if they held nothing.

        Returns:
            `[B, T, H, D]` in the dtype of `reads`.
        """
        if states_off:
            off = torch.tensor([state in states_off for state in range(reads.shape[2])], device=reads.device)
            reads = reads.masked_fill(off.view(-1, 1, 1), 0.0)
        logits = self.bias.to(reads.dtype)
        if self.weight is not None:
            logits = logits + torch.einsum("bthd,hdp->bthp", q.to(reads.dtype), self.weight.to(reads.dtype))
        logits = logits.expand(*reads.shape[:2], reads.shape[3], -1).transpose(2, 3)
        if self.config.normalizer == "none":
            return (logits.softmax(2).unsqueeze(-1) * reads).sum(2)
        if self.config.normalizer == "shared":
            factors = logits.clamp(-_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT).exp().unsqueeze(-1).unbind(2)
            first, *others = reads.unbind(2)
            weighted = factors[0] * first
            for factor, read in zip(factors[1:], others, strict=True):
                weighted = torch.addcmul(weighted, factor, read)
            held, total = weighted[..., -1] > _TINY, weighted[..., -1].clamp_min(_TINY)
            if local is None:
                return weighted[..., :-1] / total.unsqueeze(-1)
            # States that hold nothing get no weight, however small that of window and sinks is.
            near = torch.where(held, torch.sigmoid(local[1] - total.log()), 1.0)
            far = ((1 - near) / total).unsqueeze(-1)
            return torch.addcmul(near.unsqueeze(-1) * local[0], far, weighted[..., :-1])
        total = reads[..., -1]
        parts, holds = reads[..., :-1] / total.clamp_min(_TINY).unsqueeze(-1), total > _TINY
        if local is not None:
            parts = torch.cat([parts, local[0].unsqueeze(2)], 2)
            holds = torch.cat([holds, torch.ones_like(holds[:, :, :1])], 2)
        else:
            holds = holds | ~holds.any(2, keepdim=True)
        return (logits.masked_fill(~holds, -torch.inf).softmax(2).unsqueeze(-1) * parts).sum(2)
