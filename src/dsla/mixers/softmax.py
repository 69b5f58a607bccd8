"""The teacher's own mixer: softmax attention over everything seen, one key and value kept a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsla.mixers.base import AttentionShape, Memory, StateSpec, TensorSpec
from dsla.ops import attend_decode, attend_prefill
from dsla.ops.cpu import PageTable


class SoftmaxMixer:
    """Full causal attention. It has no parameters of its own and no fixed memory.

    Args:
        shape: sizes of the attention layer.
    """

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """Memory of one layer and request; `dtype` is the KV cache's."""
        row = TensorSpec((self.shape.n_kv_heads, self.shape.head_dim), dtype)
        return StateSpec(per_token={"k": row, "v": row}, fixed={})

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Memory, tables: Sequence[PageTable], lengths: Tensor
    ) -> Tensor:
        """Mixes one new token of each of N requests; arguments as `dsla.ops.attend_decode`."""
        return attend_decode(q, k, v, pages, tables, lengths)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, pages: Memory, table: PageTable, prior: int) -> Tensor:
        """Mixes T new tokens of one request; arguments as `dsla.ops.attend_prefill`."""
        return attend_prefill(q, k, v, pages, table, prior)
