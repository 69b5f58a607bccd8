"""The decode step: one token a sequence, states updated in place on a pool of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from dsla.ops.rounding import rounded
from dsla.ops.shapes import state_dtype


def recurrent_dsla(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, pool: Tensor, slots: Tensor, positions: Tensor
) -> Tensor:
    """Advances the states at `pool[slots]` by one token, in place, and reads them.

    Args:
        q: queries `[N, H, K]`.
        k: keys `[N, G, K]`.
        v: values `[N, G, V]`.
        log_g: log gates `[N, S, G, K]` or `[N, S, G, 1]`, <= 0.
        pool: states `[n_slots, S, G, K, V]`, fp32, fp64 or bfloat16, changed in place at rows `slots`.
        slots: row of the pool of each sequence, `[N]` int64, no row twice.
        positions: tokens seen by each sequence with this one, `[N]` int64; decides how bfloat16 states are rounded.

    Returns:
        `o` `[N, S, H, V]` in fp32 (fp64 for fp64 states), read before the states are rounded.

    Raises:
        ValueError: if shapes do not belong together.
    """
    n, groups, width = k.shape
    n_states, v_width = log_g.shape[1], v.shape[-1]
    if pool.shape[1:] != (n_states, groups, width, v_width) or slots.shape != (n,):
        raise ValueError(
            f"pool must be [n_slots, {n_states}, {groups}, {width}, {v_width}] and slots [{n}], "
            f"found {tuple(pool.shape)} and {tuple(slots.shape)}"
        )
    dtype = state_dtype(pool.dtype)
    state = pool.index_select(0, slots).to(dtype)
    state.mul_(log_g.to(dtype).exp().unsqueeze(-1))
    state.add_((k.to(dtype).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)).unsqueeze(1))
    pool.index_copy_(0, slots, rounded(state, pool.dtype, positions))
    grouped = q.to(dtype).view(n, 1, groups, -1, width)
    return torch.matmul(grouped, state).view(n, n_states, -1, v_width)
