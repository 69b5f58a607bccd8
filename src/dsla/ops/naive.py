"""The oracle: the recurrence as written, one token at a time, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from dsla.ops.shapes import check_kv, check_q, initial_states, sequence_lengths


def naive_dsla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads of every state at every token, by the recurrence, in fp64. Slow: for tests and references only.

    Args:
        q: queries `[B, T, H, K]`, any float dtype.
        k: keys `[B, T, G, K]`.
        v: values `[B, T, G, V]`.
        log_g: log gates `[B, T, S, G, K]` or `[B, T, S, G, 1]`, <= 0.
        initial_state: `[N, S, G, K, V]`. Default: zeros.
        cu_seqlens: `[N + 1]` bounds of packed sequences (B = 1). Default: B sequences of T tokens.

    Returns:
        `o` `[B, T, S, H, V]` and the final state `[N, S, G, K, V]`, both fp64.

    Raises:
        ValueError: if shapes do not belong together.
    """
    check_kv(k, v, log_g)
    check_q(q, k)
    batch, tokens, heads, width = q.shape
    groups, n_states, v_width = k.shape[2], log_g.shape[2], v.shape[3]
    lengths = sequence_lengths(batch, tokens, cu_seqlens)
    q, k, v, gate = q.double(), k.double(), v.double(), log_g.double().exp()
    flat = [x.flatten(0, 1) for x in (q, k, v, gate)]
    start = initial_states(initial_state, (len(lengths), n_states, groups, width, v_width), q)

    reads, finals, token = [], [], 0
    for n, length in enumerate(lengths):
        state = start[n]
        for _ in range(length):
            q_t, k_t, v_t, g_t = (x[token] for x in flat)
            state = g_t.unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
            per_head = state.repeat_interleave(heads // groups, dim=1)
            reads.append((q_t.unsqueeze(-1) * per_head).sum(-2))
            token += 1
        finals.append(state)
    o = torch.stack(reads) if reads else q.new_zeros(0, n_states, heads, v_width)
    final = torch.stack(finals) if finals else start
    return o.view(batch, tokens, n_states, heads, v_width), final
