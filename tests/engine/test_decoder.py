"""The packed decoder against transformers, and its weights against bad checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.decoder import PackedDecoder
from dsla.engine.linears import Int4Linear
from dsla.engine.memory import RequestMemory
from dsla.engine.weights import build_weights
from dsla.errors import ModelError
from dsla.families import family_of
from dsla.ops.cpu import bindings
from dsla.ops.linear import pack_int4, unpack_int4
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
        logits |= dict(zip(sampled, decoder.forward(PackedBatch(segments), arena), strict=True))
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


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "pytorch"])
def test_int4_weights(tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(bindings, "kernels", lambda: None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    model.save_pretrained(tmp_path)
    family = family_of(config)
    whole = PackedDecoder.load(tmp_path, dtype=torch.bfloat16)
    rounded = PackedDecoder.load(tmp_path, dtype=torch.bfloat16, int4=True)
    assert rounded.int4 and not whole.int4
    assert rounded.nbytes < whole.nbytes
    for one in rounded.weights.layers[0].qkv, rounded.weights.head:
        assert isinstance(one, Int4Linear)
    tensors = {name: weight.float() for name, weight in model.state_dict().items()}
    for name, weight in tensors.items():
        if weight.dim() == 2 and not name.endswith("embed_tokens.weight"):
            tensors[name] = unpack_int4(pack_int4(weight.bfloat16()))
    tensors["lm_head.weight"] = unpack_int4(pack_int4(tensors["model.embed_tokens.weight"].bfloat16()))
    expected = PackedDecoder(build_weights(tensors, config, family, torch.float32), config, family)
    prompts = [random_prompt(12), random_prompt(40)]
    found = last_logits(rounded, prompts, 8).float()
    assert (found - last_logits(expected, prompts, 8)).norm() / found.norm() < 0.03


def test_int4_goes_with_bf16(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="int4 weights go with bf16"):
        PackedDecoder.load(tmp_path, int4=True)


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantised_tensor_is_named(dtype: torch.dtype) -> None:
    model, name = tiny_model(), "model.layers.1.mlp.up_proj.weight"
    tensors = {**model.state_dict(), name: model.state_dict()[name].to(dtype)}
    with pytest.raises(ModelError, match=rf"'{name}' is {str(dtype).removeprefix('torch.')}, expected float16"):
        build_weights(tensors, model.config, family_of(model.config), torch.float32)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.4.mlp.up_proj.weight"])
def test_unused_tensor_is_named(name: str) -> None:
    model = tiny_model()
    tensors = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    build_weights(tensors, model.config, family_of(model.config), torch.float32)
    with pytest.raises(ModelError, match=f"holds tensor '{name}', which a llama model"):
        build_weights(tensors | {name: torch.ones(1)}, model.config, family_of(model.config), torch.float32)


@pytest.mark.parametrize("missing", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_bias_that_the_config_promises_is_required(missing: str) -> None:
    settings = tiny_model().config.to_dict() | {"attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    tensors = dict(model.state_dict())
    del tensors[f"model.layers.2.{missing}.bias"]
    with pytest.raises(ModelError, match=f"lacks tensor 'model.layers.2.{missing}.bias'"):
        build_weights(tensors, model.config, family_of(model.config), torch.float32)


def test_bias_that_the_config_denies_is_refused() -> None:
    model = tiny_model()
    tensors = {**model.state_dict(), "model.layers.2.self_attn.q_proj.bias": torch.ones(24)}
    with pytest.raises(ModelError, match=r"holds tensor 'model.layers.2.self_attn.q_proj.bias'"):
        build_weights(tensors, model.config, family_of(model.config), torch.float32)


@pytest.mark.parametrize("missing", "qkv")
def test_biases_of_a_fused_projection_agree(missing: str) -> None:
    settings = tiny_model().config.to_dict()
    del settings["attention_bias"], settings["model_type"], settings["architectures"]
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    tensors, family = dict(model.state_dict()), family_of(model.config)
    assert build_weights(tensors, model.config, family, torch.float32).layers[0].qkv.bias is not None
    del tensors[f"model.layers.0.self_attn.{missing}_proj.bias"]
    with pytest.raises(ModelError, match=f"lacks tensor 'model.layers.0.self_attn.{missing}_proj.bias'"):
        build_weights(tensors, model.config, family, torch.float32)


def test_head_that_differs_from_the_embedding_counts_though_the_config_ties_it(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**tiny_model(torch.float32, tied=False).config.to_dict()))
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path, state_dict=tiny_model(torch.float32, tied=False).state_dict())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    decoder, prompt = PackedDecoder.load(tmp_path), random_prompt(9)
    assert loaded.config.tie_word_embeddings and decoder.weights.head is not decoder.weights.embed
    found = last_logits(decoder, [prompt], 9)
    assert (found - loaded(torch.tensor([prompt])).logits[0, -1]).abs().max() <= 1e-4


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
