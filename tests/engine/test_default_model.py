"""The default model with its shipped adapter in fp32: level 0 as transformers, live conversion as the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsla.convert import find_adapter, read_config
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.hub import resolve_model
from tests.engine.tiny import RecordingEngine, reference_logits


@pytest.mark.model
def test_level_rise_of_the_default_model_as_reference() -> None:
    path = resolve_model()
    adapter = find_adapter(path, read_config(path), None, torch.float32)
    assert adapter is not None
    decoder = PackedDecoder.load(path, adapter, torch.float32)
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
    for mixer in adapter.mixers.values():
        mixer.double()
    expected = reference_logits(prompt + engine.outputs["x"][:-1], levels, adapter.mixers, model)[len(prompt) - 1 :]
    assert (torch.stack(engine.logits["x"]) - expected).abs().max() <= 1e-3


@pytest.mark.model
def test_level_0_of_the_default_model_as_transformers() -> None:
    path = resolve_model()
    decoder = PackedDecoder.load(path, dtype=torch.float32)
    engine = RecordingEngine(decoder, decoder.arena(64 << 20), EngineConfig(max_step_tokens=100))
    prompt = torch.randint(1000, 40000, (180,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True), request_id="x")
    engine.run()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + engine.outputs["x"][:-1]])).logits[0, len(prompt) - 1 :]
    assert (torch.stack(engine.logits["x"]) - expected).abs().max() <= 1e-4
