"""What a family file says, and the arithmetic all families share. No mixers and no engine types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from dsla.mixers import AttentionShape

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rope types whose angles depend on the position alone; those of `dynamic` and `longrope` change with the length seen."""

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""Activations of an MLP by what configs call them."""

NORM_EPS = {"rms": "rms_norm_eps", "layer": "layer_norm_eps"}
"""Kinds of norms, and the setting that holds their epsilon."""


@dataclass(frozen=True)
class Family:
    """Names and habits of a model family. Names are as in its Hugging Face checkpoints, without `.weight` and `.bias`.

    A fact that differs between models of a family names the config's setting that says it, until `settled`.

    Attributes:
        name: the family's name.
        model_types: `model_type` values of its configs.
        embed: token embedding.
        layers: list of layers; layer i is `{layers}.{i}`.
        norm: final norm.
        head: output head; absent from the checkpoint where it is tied to the embedding.
        attention: attention module inside a layer; `qkv` and `o` are its projections.
        qkv: projections to queries, keys and values: three, or one whose output holds them in this order.
        o: output projection.
        attention_norm: norm before attention, inside a layer.
        mlp_norm: norm before the MLP, inside a layer; None = the MLP runs beside attention and reads the same norm.
        mlp_in: projections to the gate and what it scales, inside a layer: two, or one whose output holds them in this
            order; one without a gate.
        mlp_out: the MLP's output projection, inside a layer.
        rope: Hugging Face config -> inverse frequencies `[R // 2]` fp32 of the R rotated dims of a head, and the factor on
            cos and sin.
        gated: whether the MLP is `out(act(gate) * up)`, otherwise `out(act(up))`.
        norm_kind: `rms` (no bias) or `layer` (with bias), of every norm.
        q_norm: norm of each query head before the rotation, inside the attention module; None = none.
        k_norm: the same for key heads.
        head_norms: whether models have these two norms.
        qkv_bias: whether `qkv` has biases; `o_bias`, `mlp_bias` (all its projections) and `head_bias` likewise.
        all_slide: whether a `sliding_window` in the config holds for every layer, whatever its `layer_types` say.
    """

    name: str
    model_types: tuple[str, ...]
    embed: str
    layers: str
    norm: str
    head: str
    attention: str
    qkv: tuple[str, ...]
    o: str
    attention_norm: str
    mlp_norm: str | None
    mlp_in: tuple[str, ...]
    mlp_out: str
    rope: Callable[[Any], tuple[Tensor, float]]
    gated: bool = True
    norm_kind: Literal["rms", "layer"] = "rms"
    q_norm: str | None = None
    k_norm: str | None = None
    head_norms: bool | str = True
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    all_slide: bool = False

    def settled(self, config: Any) -> Family:
        """This family with every fact as `config` says it: flags are bools, and norms a model lacks are None."""

        def says(fact: bool | str) -> bool:
            return bool(getattr(config, fact)) if isinstance(fact, str) else fact

        flags = ("head_norms", "qkv_bias", "o_bias", "mlp_bias", "head_bias")
        facts: dict[str, Any] = {flag: says(getattr(self, flag)) for flag in flags}
        if not facts["head_norms"]:
            facts |= {"q_norm": None, "k_norm": None}
        return replace(self, **facts)


def attention_shape(config: Any) -> AttentionShape:
    """Sizes of the attention layers of a Hugging Face config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return AttentionShape(config.hidden_size, config.num_attention_heads, groups, head_dim)


def context_length(config: Any) -> int:
    """Positions the model was made for."""
    return int(config.max_position_embeddings)
