"""How states are kept in bfloat16.

A state sums over thousands of tokens, so that what one token adds, and what the gate takes, is less than half a unit in the
last of bfloat16's 8 bits: rounded to the nearest, the state would stand still. It is rounded up or down instead, up with the
probability of the part that is cut off, so that errors cancel over time (Croci et al., Stochastic rounding, R. Soc. Open Sci.
2022). The threshold is no random number but a point of a low-discrepancy sequence over elements and positions, the R2 sequence
of M. Roberts: errors cancel sooner, and a state is a function of the tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 2^32 / x and 2^32 / x^2 with x^3 = x + 1.
ELEMENT_STEP, POSITION_STEP = 0xC13FA9A9, 0x91E10DA5


def rounded(states: Tensor, dtype: torch.dtype, positions: Tensor) -> Tensor:
    """States as they are kept.

    Args:
        states: `[N, ...]`, fp32 or fp64.
        dtype: what they are kept in: bfloat16, or theirs.
        positions: tokens seen by each, `[N]` int64.

    Returns:
        `[N, ...]` in `dtype`; what bfloat16 holds exactly is not changed.
    """
    if dtype is not torch.bfloat16:
        return states.to(dtype)
    elements = torch.arange(states[0].numel(), device=states.device) * ELEMENT_STEP
    thresholds = ((positions.view(-1, 1) * POSITION_STEP + elements) & 0xFFFFFFFF) >> 16
    bits = states.float().contiguous().view(torch.int32).flatten(1) + thresholds.to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(dtype).view(states.shape)
