"""Prefill and training: the recurrence as matrix products over chunks of tokens, differentiable by autograd.

Inside a chunk the decay between two tokens is `exp` of a sum of log gates. Scalar gates form it pairwise, so every exponent
is <= 0. Vector gates must split it into a factor on q and one on k; the latter's exponent is positive, at most
`VECTOR_CHUNK * -LOG_GATE_FLOOR` = 19.2, which fp32 holds with room (hence the short chunk and the floor on the gates).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsla.ops.shapes import check_kv, check_q, initial_states, sequence_lengths, state_dtype

LOG_GATE_FLOOR = -1.2
SCALAR_CHUNK = 64
VECTOR_CHUNK = 16


def chunk_dsla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads of every state at every token, and the final states; equal to `naive_dsla` up to rounding.

    Args:
        q: queries `[B, T, H, K]`.
        k: keys `[B, T, G, K]`.
        v: values `[B, T, G, V]`.
        log_g: log gates `[B, T, S, G, K]` (vector, each >= `LOG_GATE_FLOOR`) or `[B, T, S, G, 1]` (scalar), <= 0.
        initial_state: `[N, S, G, K, V]`. Default: zeros.
        cu_seqlens: `[N + 1]` bounds of packed sequences (B = 1). Default: B sequences of T tokens.

    Returns:
        `o` `[B, T, S, H, V]` and the final state `[N, S, G, K, V]`, both fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: if shapes do not belong together, or a vector gate lies under the floor.
    """
    check_kv(k, v, log_g)
    check_q(q, k)
    batch, tokens, heads, width = q.shape
    groups, n_states, v_width = k.shape[2], log_g.shape[2], v.shape[3]
    vector = log_g.shape[4] > 1
    if vector and log_g.numel() and float(log_g.detach().amin()) < LOG_GATE_FLOOR - 1e-6:
        raise ValueError(f"vector log gates must be >= {LOG_GATE_FLOOR}, found {float(log_g.detach().amin()):.3f}")
    dtype = state_dtype(q.dtype)
    lengths = sequence_lengths(batch, tokens, cu_seqlens)
    start = initial_states(initial_state, (len(lengths), n_states, groups, width, v_width), q.to(dtype))
    if tokens == 0 or batch == 0:
        return q.new_zeros((batch, tokens, n_states, heads, v_width), dtype=dtype), start

    layout = _ChunkLayout.of(lengths, VECTOR_CHUNK if vector else SCALAR_CHUNK, q.device)
    # [chunks, G, R, C, K], [chunks, G, C, K], [chunks, G, C, V], [chunks, G, S, C, K | 1]
    q_c = layout.split(q.to(dtype).flatten(0, 1)).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    k_c = layout.split(k.to(dtype).flatten(0, 1)).transpose(1, 2)
    v_c = layout.split(v.to(dtype).flatten(0, 1)).transpose(1, 2)
    g_c = layout.split(log_g.to(dtype).flatten(0, 1)).permute(0, 3, 2, 1, 4)
    o, final = (_vector if vector else _scalar)(q_c, k_c, v_c, g_c, start, layout)
    # [chunks, G, S, R, C, V] -> [B, T, S, H, V]
    o = layout.join(o.permute(0, 4, 2, 1, 3, 5).flatten(3, 4))
    return o.view(batch, tokens, n_states, heads, v_width), final


@dataclass(frozen=True)
class _ChunkLayout:
    """Which tokens make up which chunk: chunks never cross a sequence; the last one of a sequence may be short.

    `ranks` are the first chunks of all sequences, the second ones, and so on, each with its sequence; none where every
    sequence has as many.
    """

    index: Tensor | None
    inverse: Tensor | None
    size: int
    ranks: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, lengths: list[int], size: int, device: torch.device) -> _ChunkLayout:
        counts = [-(-length // size) for length in lengths]
        first = [sum(counts[:n]) for n in range(len(counts))]
        ranks = []
        if len(set(counts)) > 1:
            for rank in range(max(counts)):
                sequences = [n for n, count in enumerate(counts) if count > rank]
                chunks = [first[n] + rank for n in sequences]
                ranks.append((torch.tensor(chunks, device=device), torch.tensor(sequences, device=device)))
        if all(length % size == 0 for length in lengths):
            return cls(None, None, size, tuple(ranks))
        total = sum(lengths)
        index = torch.full((sum(counts) * size,), total, dtype=torch.int64)
        token, where = 0, []
        for n, length in enumerate(lengths):
            begin = first[n] * size
            index[begin : begin + length] = torch.arange(token, token + length)
            where.append(torch.arange(begin, begin + length))
            token += length
        return cls(index.to(device), torch.cat(where).to(device), size, tuple(ranks))

    def split(self, x: Tensor) -> Tensor:
        """`[tokens, ...]` -> `[chunks, C, ...]`, short chunks filled with zeros (no key, gate one: no effect)."""
        if self.index is not None:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.index)
        return x.view(-1, self.size, *x.shape[1:])

    def join(self, x: Tensor) -> Tensor:
        """`[chunks, C, ...]` -> `[tokens, ...]`."""
        x = x.flatten(0, 1)
        return x if self.inverse is None else x.index_select(0, self.inverse)

    def scan(self, start: Tensor, decay: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        """Carries `start` `[N, ...]` through chunks `[chunks, ...]`: the state before each chunk, and after the last."""
        state, before = start, []
        if not self.ranks:
            steps = zip(*(x.unflatten(0, (len(start), -1)).unbind(1) for x in (decay, increment)), strict=True)
            for kept, added in steps:
                before.append(state)
                state = torch.addcmul(added, state, kept)
            return torch.stack(before, 1).flatten(0, 1), state
        for chunks, sequences in self.ranks:
            current = state.index_select(0, sequences)
            before.append(current)
            moved = torch.addcmul(increment.index_select(0, chunks), current, decay.index_select(0, chunks))
            state = state.index_copy(0, sequences, moved)
        order = torch.cat([chunks for chunks, _ in self.ranks])
        return torch.cat(before).index_select(0, torch.argsort(order)), state


def _scalar(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, start: Tensor, layout: _ChunkLayout
) -> tuple[Tensor, Tensor]:
    # Query heads are rows of the products and states their columns (or rows), so that no operand is repeated.
    # fp64 sums: a difference of two large sums of extreme gates would lose the small gates between them.
    total = log_g.squeeze(-1).double().cumsum(-1)
    causal = torch.ones(layout.size, layout.size, dtype=torch.bool, device=q.device).tril()
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(q.dtype).masked_fill(~causal, -torch.inf).exp()
    from_start = total.to(q.dtype).exp()
    to_end = (total[..., -1:] - total).to(q.dtype).exp()
    share, n_states = q.shape[2], log_g.shape[2]
    rows = q.flatten(2, 3)

    # States as [N, G, K, S, V] and [chunks, G, K, S, V].
    scaled = v.unsqueeze(3) * to_end.transpose(2, 3).unsqueeze(-1)
    increment = (k.transpose(2, 3) @ scaled.flatten(3)).unflatten(-1, (n_states, -1))
    decay = from_start[..., -1].unsqueeze(2).unsqueeze(-1)
    before, final = layout.scan(start.permute(0, 2, 3, 1, 4), decay, increment)
    scores = (rows @ k.transpose(2, 3)).unflatten(2, (1, share, -1)) * between.unsqueeze(3)
    inside = (scores.flatten(2, 4) @ v).unflatten(2, (n_states, share, -1))
    carried = (rows @ before.flatten(3)).view(*rows.shape[:2], share, layout.size, n_states, -1)
    o = torch.addcmul(inside, carried.permute(0, 1, 4, 2, 3, 5), from_start.unsqueeze(3).unsqueeze(-1))
    return o, final.permute(0, 3, 1, 2, 4)


def _vector(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, start: Tensor, layout: _ChunkLayout
) -> tuple[Tensor, Tensor]:
    total, k = log_g.cumsum(-2), k.unsqueeze(2)
    causal = torch.ones(layout.size, layout.size, dtype=torch.bool, device=q.device).tril()
    q_decayed = q.unsqueeze(2) * total.exp().unsqueeze(3)
    k_raised = k * (-total).exp()
    k_decayed = k * (total[..., -1:, :] - total).exp()

    # States as [N, G, S, K, V] and [chunks, G, S, K, V].
    increment = (k_decayed.transpose(-1, -2).flatten(2, 3) @ v).unflatten(2, (log_g.shape[2], -1))
    before, final = layout.scan(start.transpose(1, 2), total[..., -1, :].exp().unsqueeze(-1), increment)
    scores = (q_decayed.flatten(3, 4) @ k_raised.transpose(-1, -2)).unflatten(3, (q.shape[2], -1))
    inside = (scores.masked_fill(~causal, 0.0).flatten(2, 4) @ v).view(*q_decayed.shape[:-1], -1)
    carried = (q_decayed.flatten(3, 4) @ before).view(*q_decayed.shape[:-1], -1)
    return inside + carried, final.transpose(1, 2)
