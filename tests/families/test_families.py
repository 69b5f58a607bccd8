"""Facts of families against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Phi3Config, PhiConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary

from dsla.errors import ModelError
from dsla.families import attention_shape, family_of
from dsla.ops import rotate


def test_rotation_is_transformers_own() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    q, k = torch.randn(1, 9, 4, 6), torch.randn(1, 9, 2, 6)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(9).unsqueeze(0))
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert torch.equal(rotate(q, cos, sin), expected[0].transpose(1, 2))
    assert torch.equal(rotate(k, cos, sin), expected[1].transpose(1, 2))


@pytest.mark.parametrize(("head_dim", "factor", "rotated"), [(8, 0.5, 4), (10, 0.4, 4), (8, 1.0, 8)])
def test_partial_rotation_is_transformers_own(head_dim: int, factor: float, rotated: int) -> None:
    config = Phi3Config(
        hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=2, partial_rotary_factor=factor
    )
    q, k = torch.randn(1, 9, 4, head_dim), torch.randn(1, 9, 2, head_dim)
    cos, sin = Phi3RotaryEmbedding(config)(q, torch.arange(9).unsqueeze(0))
    assert cos.shape[-1] == rotated
    expected = apply_partial_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert torch.equal(rotate(q, cos, sin), expected[0].transpose(1, 2))
    assert torch.equal(rotate(k, cos, sin), expected[1].transpose(1, 2))
    assert torch.equal(rotate(q, cos, sin)[..., rotated:], q[..., rotated:])
    inverse, scale = family_of(config).rope(config)
    assert inverse.shape == (rotated // 2,) and scale == 1.0


@pytest.mark.parametrize("norms", [False, True])
def test_open_facts_are_settled_by_the_config(norms: bool) -> None:
    family = family_of(PhiConfig(qk_layernorm=norms))
    assert (family.q_norm, family.k_norm) == (("q_layernorm", "k_layernorm") if norms else (None, None))
    biased = family_of(LlamaConfig(attention_bias=norms, mlp_bias=not norms))
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias, biased.head_bias) == (norms, norms, not norms, False)


def test_shape_and_rope_come_from_the_config() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    shape = attention_shape(config)
    assert (shape.n_heads, shape.n_kv_heads, shape.head_dim) == (4, 2, 6)
    inverse, factor = family_of(config).rope(config)
    assert inverse.shape == (3,) and factor == 1.0


def test_unknown_family_is_named() -> None:
    with pytest.raises(
        ModelError, match="'gpt2' is not supported; supported families: llama, mistral, phi, phi3, qwen2"
    ):
        family_of(GPT2Config())
