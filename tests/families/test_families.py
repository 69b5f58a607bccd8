"""Facts of families against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dsla.errors import ModelError
from dsla.families import attention_shape, family_of, rotate


def test_rotation_is_transformers_own() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    q, k = torch.randn(1, 9, 4, 6), torch.randn(1, 9, 2, 6)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(9).unsqueeze(0))
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert torch.equal(rotate(q, cos, sin), expected[0].transpose(1, 2))
    assert torch.equal(rotate(k, cos, sin), expected[1].transpose(1, 2))


def test_shape_and_rope_come_from_the_config() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    shape = attention_shape(config)
    assert (shape.n_heads, shape.n_kv_heads, shape.head_dim) == (4, 2, 6)
    inverse, factor = family_of(config).rope(config)
    assert inverse.shape == (3,) and factor == 1.0


def test_unknown_family_is_named() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported families: llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())
