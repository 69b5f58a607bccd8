"""Every family on a tiny random model: both faces as transformers at level 0, as each other at the others, live rise too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dsla.convert import Plan, Teacher
from dsla.convert.adapter import cast
from dsla.convert.surgery import Levels
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.engine.weights import build_weights
from dsla.errors import ModelError
from dsla.families import FAMILIES, attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from tests.engine.tiny import RecordingEngine

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 60, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, head_dim=6),
    "llama with biases": LlamaConfig(**SIZES, head_dim=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
ORDER = (1, 2, 0)


def make(name: str) -> tuple[Any, dict[int, DslaMixer]]:
    torch.manual_seed(3)
    config = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    mixers = {}
    for layer in ORDER:
        mixer = cast(DslaMixer(DslaConfig(window=4, sinks=2, delta_rank=3), attention_shape(config)), torch.float32)
        mixers[layer] = mixer.eval().requires_grad_(False)
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, mixers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (3, 3), (0, 3), (1, 2)])
def test_both_faces_agree(name: str, before: int, after: int) -> None:
    model, mixers = make(name)
    family = family_of(model.config)
    weights = build_weights(model.state_dict(), model.config, family, torch.float32)
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
    levels = Levels(model, Plan(Teacher("tiny", "0" * 64, 3), ORDER, DslaConfig(window=4, sinks=2)), mixers)
    cache = DynamicCache(config=model.config)
    levels.set(before)
    head = model(tokens[:, :changed], past_key_values=cache).logits if changed else tokens.new_empty(1, 0, 61)
    levels.set(after)
    logits = torch.cat([head, model(tokens[:, changed:], past_key_values=cache).logits], 1)[0]
    if after == 0:
        assert torch.equal(logits, plain[0])
    else:
        assert not torch.allclose(logits, plain[0], atol=1e-2)
    torch.testing.assert_close(torch.stack(engine.logits["x"]), logits[len(prompt) - 1 :], rtol=1e-4, atol=1e-4)


def test_every_family_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=32),
        MistralConfig(**{**SIZES, "max_position_embeddings": 16}, sliding_window=32),
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    ],
    ids=["mistral", "mistral, short context", "qwen2"],
)
def test_sliding_windows_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ModelError, match="sliding window of 32"):
        family_of(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
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
