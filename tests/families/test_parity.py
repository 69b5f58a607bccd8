"""Every family on tiny random models: both faces as transformers at level 0, as each other at the others, live rise too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, Phi3Config, PretrainedConfig, Qwen2Config, Qwen3Config

from dsla.convert import Plan, Teacher
from dsla.convert.adapter import cast
from dsla.convert.surgery import Levels
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.engine.weights import build_weights
from dsla.errors import ModelError
from dsla.families import FAMILIES, attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from tests.engine.test_decoder import fp64_norm
from tests.engine.tiny import RecordingEngine
from tests.families.tiny import CONFIGS, SIZES, random_model

ORDER = (1, 2, 0)
MIXER = DslaConfig(window=4, sinks=2, delta_rank=3)


def make(name: str, dtype: torch.dtype) -> tuple[Any, dict[int, DslaMixer]]:
    model, mixers = random_model(CONFIGS[name], dtype), {}
    for layer in ORDER:
        mixer = cast(DslaMixer(MIXER, attention_shape(model.config)), dtype)
        mixers[layer] = mixer.eval().requires_grad_(False)
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, mixers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "before", "after"),
    [(torch.float32, 1e-4, *levels) for levels in [(0, 0), (2, 2), (3, 3), (0, 3), (1, 2)]]
    + [(torch.float64, 1e-9, *levels) for levels in [(0, 0), (0, 3)]],
)
def test_both_faces_agree(
    name: str, dtype: torch.dtype, tolerance: float, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mixers = make(name, dtype)
    if dtype == torch.float64 and not isinstance(model.get_decoder().layers[0].input_layernorm, torch.nn.LayerNorm):
        monkeypatch.setattr(type(model.get_decoder().norm), "forward", fp64_norm)
    family = family_of(model.config)
    weights = build_weights(model.state_dict(), model.config, family, dtype)
    assert weights.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    decoder = PackedDecoder(weights, model.config, family, mixers)
    engine = RecordingEngine(decoder, decoder.arena(1 << 22), EngineConfig(level=before, max_step_tokens=9))
    prompt = torch.randint(0, 60, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True), request_id="x")
    for _ in range(5):
        engine.step()
    engine.set_level(after)
    engine.run()
    changed = engine.final["x"].levels[-1][0]
    tokens = torch.tensor([prompt + engine.outputs["x"][:-1]])

    plain = model(tokens).logits
    levels = Levels(model, Plan(Teacher("tiny", "0" * 64, 3), ORDER, MIXER), mixers)
    cache = DynamicCache(config=model.config)
    levels.set(before)
    head = model(tokens[:, :changed], past_key_values=cache).logits if changed else plain[:, :0]
    levels.set(after)
    logits = torch.cat([head, model(tokens[:, changed:], past_key_values=cache).logits], 1)[0]
    if after == 0:
        assert torch.equal(logits, plain[0])
    else:
        assert not torch.allclose(logits, plain[0], atol=1e-2)
    found = torch.stack(engine.logits["x"])
    torch.testing.assert_close(found, logits[len(prompt) - 1 :], rtol=tolerance, atol=tolerance)


def test_every_family_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=32),
        MistralConfig(**{**SIZES, "max_position_embeddings": 16}, sliding_window=32),
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1),
        Phi3Config(**SIZES, sliding_window=32),
    ],
    ids=["mistral", "mistral, short context", "qwen2", "phi3"],
)
def test_sliding_windows_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ModelError, match="sliding window of 32"):
        family_of(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 3,
                    "long_factor": [1.0] * 3,
                }
            },
            "longrope",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ],
    ids=["activation", "dynamic rope", "long rope", "quantised"],
)
def test_what_no_face_computes_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        family_of(Qwen3Config(**SIZES, **change))


def test_long_rope_of_phi3_is_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
    with pytest.raises(ModelError, match="this phi3 model has rope type 'longrope'"):
        family_of(Phi3Config(**SIZES, rope_parameters=rope))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("phi", "model.layers.1.self_attn.dense.bias"),
        ("phi", "model.layers.1.mlp.fc1.bias"),
        ("phi", "model.layers.1.input_layernorm.bias"),
        ("phi", "model.final_layernorm.bias"),
        ("phi", "lm_head.bias"),
        ("phi, head norms", "model.layers.1.self_attn.k_layernorm.weight"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
        ("qwen3, biases", "model.layers.1.self_attn.o_proj.bias"),
    ],
)
def test_checkpoint_lacking_what_its_family_has_is_named(name: str, missing: str) -> None:
    tensors = dict(random_model(CONFIGS[name]).state_dict())
    del tensors[missing]
    with pytest.raises(ModelError, match=f"lacks tensor '{missing}'"):
        build_weights(tensors, CONFIGS[name], family_of(CONFIGS[name]), torch.float32)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("mistral", "model.layers.1.self_attn.q_proj.bias"),
        ("qwen2", "model.layers.1.self_attn.o_proj.bias"),
        ("qwen2", "model.layers.1.mlp.down_proj.bias"),
        ("qwen3", "model.layers.1.mlp.up_proj.bias"),
        ("phi", "model.layers.1.self_attn.q_layernorm.weight"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.bias"),
    ],
)
def test_checkpoint_with_what_its_family_lacks_is_refused(name: str, extra: str) -> None:
    tensors = {**random_model(CONFIGS[name]).state_dict(), extra: torch.ones(8)}
    with pytest.raises(ModelError, match=f"holds tensor '{extra}'"):
        build_weights(tensors, CONFIGS[name], family_of(CONFIGS[name]), torch.float32)
