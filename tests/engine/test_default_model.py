"""Live conversion of the default model in fp32, against the independent fp64 reference."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsla.convert import read_config
from dsla.convert.adapter import cast
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.families import attention_shape
from dsla.hub import resolve_model
from dsla.mixers import DslaConfig, DslaMixer
from tests.engine.tiny import RecordingEngine, reference_logits


@pytest.mark.model
def test_level_rise_of_the_default_model_as_reference() -> None:
    path = resolve_model()
    config = read_config(path)
    torch.manual_seed(0)
    mixers = {}
    for layer in range(0, 30, 2):
        mixer = cast(DslaMixer(DslaConfig(), attention_shape(config)), torch.float32).eval().requires_grad_(False)
        for parameter in mixer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        mixers[layer] = mixer
    loaded = PackedDecoder.load(path, dtype=torch.float32)
    decoder = PackedDecoder(loaded.weights, config, loaded.family, mixers)
    engine = RecordingEngine(decoder, decoder.arena(64 << 20), EngineConfig(max_step_tokens=100))
    prompt = torch.randint(1000, 40000, (180,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True), request_id="x")
    for _ in range(5):
        engine.step()
    engine.set_level(15)
    engine.run()
    levels = engine.final["x"].levels
    assert levels == [[0, 0], [183, 15]]

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.requires_grad_(False)
    for mixer in mixers.values():
        mixer.double()
    expected = reference_logits(prompt + engine.outputs["x"][:-1], levels, mixers, model)[len(prompt) - 1 :]
    assert (torch.stack(engine.logits["x"]) - expected).abs().max() <= 1e-3
