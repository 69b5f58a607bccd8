"""The teacher's own mixer: softmax attention over everything seen, one key and value kept a token."""

from __future__ import annotations

import torch
from torch import Tensor

from dsla.mixers.base import AttentionShape, StateSpec, TensorSpec
from dsla.ops import causal_attention


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mixes the last T of n tokens of one request.

        Args:
            q: rotated queries `[T, H, D]`.
            k: rotated keys `[n, G, D]`, the T new ones last.
            v: values `[n, G, D]`.

        Returns:
            `[T, H, D]`.
        """
        return causal_attention(q, k, v)
