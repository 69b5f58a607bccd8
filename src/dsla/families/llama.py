"""Llama and checkpoints of its shape (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsla.families.base import Family


def _rope(config: Any) -> tuple[Tensor, float]:
    # Scaled variants (llama3, yarn, ...) are arithmetic transformers keeps; taken from there once, when a model is built.
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    embed="model.embed_tokens",
    layers="model.layers",
    norm="model.norm",
    head="lm_head",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    o="o_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    rope=_rope,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)
