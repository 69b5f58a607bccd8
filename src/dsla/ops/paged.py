"""Softmax attention of new tokens over keys and values that lie in pages, to which their own are added first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsla.ops.attention import causal_attention
from dsla.ops.cpu import MAX_DIM, PageTable, native


def attend_decode(
    q: Tensor, k: Tensor, v: Tensor, pages: Mapping[str, Tensor], tables: Sequence[PageTable], lengths: Tensor
) -> Tensor:
    """One new token of each of N requests.

    Args:
        q: rotated queries `[N, H, D]`.
        k: rotated keys `[N, G, D]`.
        v: values `[N, G, D]`.
        pages: `k` and `v`, `[n_units, page_tokens, G, D]`, changed in place.
        tables: the pages of each request, with room for the new token.
        lengths: tokens seen before, `[N]` int64.

    Returns:
        `[N, H, D]` in q's dtype.
    """
    kernels = native(q) if _fits(q) else None
    if kernels is not None:
        return kernels.attend_decode(q, k, v, pages, tables, lengths)
    rows = zip(tables, lengths.tolist(), strict=True)
    return torch.cat([_attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], pages, *row) for i, row in enumerate(rows)])


def attend_prefill(
    q: Tensor, k: Tensor, v: Tensor, pages: Mapping[str, Tensor], table: PageTable, prior: int
) -> Tensor:
    """T new tokens of one request that has seen `prior`; arguments else as `attend_decode`, `[T, ...]`."""
    kernels = native(q) if _fits(q) else None
    attend = _attend if kernels is None else kernels.attend_prefill
    return attend(q, k, v, pages, table, prior)


def gathered(pages: Mapping[str, Tensor], table: PageTable, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[tokens, G, D]` of the first `tokens` tokens of a request, copied from its pages."""
    k, v = pages["k"], pages["v"]
    count = -(-tokens // k.shape[1])
    units = torch.from_numpy(table.units[:count]).to(k.device)
    return k.index_select(0, units).flatten(0, 1)[:tokens], v.index_select(0, units).flatten(0, 1)[:tokens]


def _attend(q: Tensor, k: Tensor, v: Tensor, pages: Mapping[str, Tensor], table: PageTable, prior: int) -> Tensor:
    size = pages["k"].shape[1]
    positions = torch.arange(prior, prior + len(q), device=q.device)
    place = (torch.from_numpy(table.units).to(q.device)[positions // size], positions % size)
    pages["k"].index_put_(place, k)
    pages["v"].index_put_(place, v)
    return causal_attention(q, *(gathered(pages, table, prior + len(q)) if prior else (k, v)))


def _fits(q: Tensor) -> bool:
    """Whether the kernels know the head dim, and each row's heads lie side by side."""
    return q.shape[-1] % 32 == 0 and q.shape[-1] <= MAX_DIM
