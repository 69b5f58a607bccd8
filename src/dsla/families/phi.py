"""Phi (1, 1.5, 2): attention beside the MLP, LayerNorms, biases everywhere. Phi-3 and 4: Llama's shape, fused projections.

Both rotate a part of each head only. Phi-3 checkpoints with a sliding window or LongRoPE are refused by `family_of`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dsla.families.base import Family
from dsla.families.mistral import MISTRAL


def _rope(config: Any) -> tuple[Tensor, float]:
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    rotary = PhiRotaryEmbedding(config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


PHI = Family(
    name="phi",
    model_types=("phi",),
    embed="model.embed_tokens",
    layers="model.layers",
    norm="model.final_layernorm",
    head="lm_head",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    o="dense",
    attention_norm="input_layernorm",
    mlp_norm=None,
    mlp_in=("mlp.fc1",),
    mlp_out="mlp.fc2",
    rope=_rope,
    gated=False,
    norm_kind="layer",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    head_norms="qk_layernorm",
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    head_bias=True,
)
PHI3 = replace(
    MISTRAL,
    name="phi3",
    model_types=("phi3",),
    qkv=("qkv_proj",),
    mlp_in=("mlp.gate_up_proj",),
    rope=_rope,
)
