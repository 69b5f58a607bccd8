"""Forget gates of the states: how much of each survives one more token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LONGEST_HALF_LIFE = 4096.0
_SHORTEST_HALF_LIFE = 64.0


class Gates(nn.Module):
    """Log gates `[..., S, G, width]` in fp32, `logsigmoid(W x + b) / temperature`, floored.

    They start independent of the input, with half-lives spread geometrically from 4,096 tokens (state 0, history) to 64
    (the last state, recency), so that the states differ from the first step on.

    Args:
        n_states: S.
        n_kv_heads: G.
        in_features: width of one input vector: D of a key (`per_head`), or the layer's hidden size.
        width: gates per state and KV head: F (vector) or 1 (scalar).
        temperature: divisor of the log gate.
        floor: smallest log gate.
        per_head: whether each KV head reads its own input vector `[..., G, in_features]`.
    """

    def __init__(
        self,
        n_states: int,
        n_kv_heads: int,
        in_features: int,
        width: int,
        temperature: float,
        floor: float,
        per_head: bool,
    ) -> None:
        super().__init__()
        self.temperature, self.floor, self.per_head = temperature, floor, per_head
        self.weight = nn.Parameter(torch.zeros(n_states, n_kv_heads, in_features, width))
        steps = torch.linspace(0, 1, n_states) if n_states > 1 else torch.zeros(1)
        half_life = _LONGEST_HALF_LIFE * (_SHORTEST_HALF_LIFE / _LONGEST_HALF_LIFE) ** steps
        # sigmoid(b) = exp(-temperature * ln 2 / half-life)
        log_gate = -math.log(2.0) / half_life * temperature
        bias = log_gate - torch.log(-torch.expm1(log_gate))
        self.bias = nn.Parameter(bias.view(-1, 1, 1).repeat(1, n_kv_heads, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        equation = "...gi,sgiw->...sgw" if self.per_head else "...i,sgiw->...sgw"
        logits = torch.einsum(equation, x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)
        return (F.logsigmoid(logits) / self.temperature).clamp_min(self.floor)
