"""What a family file says, and the arithmetic all families share. No mixers and no engine types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsla.mixers import AttentionShape

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rope types whose angles depend on the position alone; those of `dynamic` and `longrope` change with the length seen."""


@dataclass(frozen=True)
class Family:
    """Names and habits of a model family. Names are as in its Hugging Face checkpoints, without `.weight` and `.bias`.

    Attributes:
        name: the family's name.
        model_types: `model_type` values of its configs.
        embed: token embedding.
        layers: list of layers; layer i is `{layers}.{i}`.
        norm: final norm.
        head: output head; absent from the checkpoint where it is tied to the embedding.
        attention: attention module inside a layer; `q`, `k`, `v`, `o` are its projections.
        attention_norm: norm before attention, inside a layer.
        mlp_norm: norm before the MLP, inside a layer.
        gate: gate projection of the gated MLP, inside a layer; `up` and `down` likewise.
        rope: Hugging Face config -> inverse frequencies `[D // 2]` fp32 and the factor on cos and sin.
        q_norm: norm of each query head before the rotation, inside the attention module; None = none.
        k_norm: the same for key heads.
    """

    name: str
    model_types: tuple[str, ...]
    embed: str
    layers: str
    norm: str
    head: str
    attention: str
    q: str
    k: str
    v: str
    o: str
    attention_norm: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    rope: Callable[[Any], tuple[Tensor, float]]
    q_norm: str | None = None
    k_norm: str | None = None


def attention_shape(config: Any) -> AttentionShape:
    """Sizes of the attention layers of a Hugging Face config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return AttentionShape(config.hidden_size, config.num_attention_heads, groups, head_dim)


def context_length(config: Any) -> int:
    """Positions the model was made for."""
    return int(config.max_position_embeddings)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout (arXiv 2104.09864, as Hugging Face stores it).

    Args:
        x: heads `[..., n_heads, D]`.
        cos: `[..., D]` of each token, in x's dtype.
        sin: as `cos`.

    Returns:
        `[..., n_heads, D]`.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
