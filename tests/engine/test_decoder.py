"""The packed decoder against transformers, and its weights against bad checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.decoder import PackedDecoder
from dsla.engine.memory import RequestMemory
from dsla.engine.weights import build_weights
from dsla.errors import ModelError
from dsla.families import family_of
from tests.engine.tiny import random_prompt, tiny_decoder, tiny_model


def decoder_of(model: LlamaForCausalLM) -> PackedDecoder:
    family = family_of(model.config)
    return PackedDecoder(build_weights(model.state_dict(), model.config, family, model.dtype), model.config, family)


def last_logits(decoder: PackedDecoder, prompts: list[list[int]], chunk: int) -> Tensor:
    """Logits after every token of several prompts, packed together, `chunk` tokens of each a step."""
    arena = decoder.arena(1 << 20, page_tokens=4, poison=True)
    memories = [RequestMemory(arena, decoder.n_layers, ()) for _ in prompts]
    logits = {}
    for start in range(0, max(map(len, prompts)), chunk):
        segments = []
        for memory, prompt in zip(memories, prompts, strict=True):
            tokens = prompt[start : start + chunk]
            if tokens:
                memory.reserve(start + len(tokens))
                segments.append(Segment(memory, tokens, start, start + len(tokens) == len(prompt)))
        sampled = [memories.index(segment.memory) for segment in segments if segment.sample]
        logits |= dict(zip(sampled, decoder.forward(PackedBatch(segments, 4), arena), strict=True))
    return torch.stack([logits[i] for i in range(len(prompts))])


def fp64_norm(self: nn.Module, x: Tensor) -> Tensor:
    """transformers' RMSNorm, without its rounding to fp32."""
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
def test_level_0_equals_transformers(
    dtype: torch.dtype, tolerance: float, tied: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(dtype, tied)
    if dtype == torch.float64:
        monkeypatch.setattr(type(model.model.norm), "forward", fp64_norm)
    prompts = [random_prompt(n, n) for n in (1, 2, 9, 33, 70)]
    found = last_logits(decoder_of(model), prompts, chunk)
    expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert (found - expected).abs().max() <= tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_parameters": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 500.0,
        }},
        {"rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 500.0,
        }},
    ],
    ids=["biases", "mha", "mqa", "rope-linear", "rope-llama3", "rope-yarn"],
)  # fmt: skip
def test_variants_of_llama_equal_transformers(changes: dict) -> None:
    torch.manual_seed(3)
    settings = tiny_model().config.to_dict() | {"dtype": None} | changes
    model = LlamaForCausalLM(LlamaConfig(**settings)).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.normal_(std=0.3)
    prompts = [random_prompt(n, n) for n in (3, 40)]
    expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    assert (last_logits(decoder_of(model), prompts, 7) - expected).abs().max() <= 1e-4


def test_bf16_stays_close_to_fp32() -> None:
    prompts = [random_prompt(n, n) for n in (5, 40)]
    exact = last_logits(decoder_of(tiny_model(torch.float32)), prompts, 8)
    model = LlamaForCausalLM(tiny_model().config)
    model.load_state_dict(tiny_model(torch.float32).state_dict())
    rough = last_logits(decoder_of(model.bfloat16().eval().requires_grad_(False)), prompts, 8)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("shard", ["200MB", "20KB"], ids=["one-file", "sharded"])
def test_loads_a_model_folder(tmp_path: Path, shard: str) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    decoder = PackedDecoder.load(tmp_path)
    assert decoder.dtype == torch.float32
    prompts = [random_prompt(12)]
    assert torch.equal(
        last_logits(decoder, prompts, 12), last_logits(decoder_of(tiny_model(torch.float32)), prompts, 12)
    )
    assert (
        PackedDecoder.load(tmp_path, dtype=torch.float64).kv_spec.bytes_per_token == 2 * decoder.kv_spec.bytes_per_token
    )


def test_weights_are_held_once() -> None:
    model, decoder = tiny_model(torch.float32), decoder_of(tiny_model(torch.float32))
    assert decoder.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert decoder.weights.head is decoder.weights.embed
    assert tiny_decoder().nbytes > tiny_decoder().weights.nbytes


def test_checkpoint_lacking_a_tensor_is_named() -> None:
    model = tiny_model()
    tensors = dict(model.state_dict())
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ModelError, match=r"lacks tensor 'model.layers.1.self_attn.k_proj.weight'"):
        build_weights(tensors, model.config, family_of(model.config), torch.float32)


def test_misshapen_tensor_is_named() -> None:
    model = tiny_model()
    tensors = {**model.state_dict(), "model.norm.weight": torch.ones(25)}
    with pytest.raises(ModelError, match=r"'model.norm.weight' has shape \[25\], the config says \[24\]"):
        build_weights(tensors, model.config, family_of(model.config), torch.float32)


def test_unsupported_activation_is_refused() -> None:
    model = tiny_model()
    config = LlamaConfig(**{**model.config.to_dict(), "hidden_act": "gelu"})
    family = family_of(config)
    with pytest.raises(ModelError, match="activation 'gelu'"):
        PackedDecoder(build_weights(model.state_dict(), config, family, torch.float32), config, family)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3,
         "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_that_changes_with_the_length_is_refused(rope: dict) -> None:
    settings = tiny_model().config.to_dict() | {"rope_parameters": rope | {"rope_theta": 500.0}, "dtype": None}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with pytest.raises(ModelError, match=f"rope type '{rope['rope_type']}' is not supported"):
        decoder_of(model)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected model\.safetensors"):
        PackedDecoder.load(tmp_path)


def test_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [58, 60]}))
    assert PackedDecoder.load(tmp_path).eos_token_ids == {58, 60}


@pytest.mark.parametrize("text", ["{", "[60]", "60", '{"eos_token_id": "60"}', '{"eos_token_id": [60, null]}', "\xff"])
def test_damaged_generation_config_is_named(tmp_path: Path, text: str) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"generation_config\.json is damaged"):
        PackedDecoder.load(tmp_path)
