"""The default model and its adapter: level 0 as transformers, conversions as the fp64 reference, company as none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsla.convert import find_adapter, read_config
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.memory import RequestMemory
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


@pytest.mark.model
def test_bf16_in_company_as_alone() -> None:
    """Batched, chunked, with a prefix reused, preempted, converted and forked: the same as alone, up to rounding."""
    path = resolve_model()
    adapter = find_adapter(path, read_config(path), None, torch.bfloat16)
    decoder = PackedDecoder.load(path, adapter, torch.bfloat16)
    engine = RecordingEngine(decoder, decoder.arena(256 << 20), EngineConfig(max_step_tokens=160, level=0))
    generator = torch.Generator().manual_seed(3)
    first, second, third = (torch.randint(1000, 40000, (n,), generator=generator).tolist() for n in (500, 150, 70))
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = {"a": first, "b": second, "b.1": second}
    engine.add_request(first, params, request_id="a")
    engine.add_request(second, params, request_id="b")
    engine.add_request(second, params, request_id="b.1", sibling_of="b")
    while len(engine.outputs.get("a", [])) < 8:
        engine.step()
    engine.set_level(15)
    engine.step()
    engine._preempt(engine._requests["a"], 0.0)
    engine.run()
    prompts["c"] = first + engine.outputs["a"] + third
    engine.set_level(23)
    engine.add_request(prompts["c"], params, request_id="c")
    engine.run()
    assert engine.final["a"].levels[-1][1] == 15 and engine.final["c"].levels[-1][1] == 23
    assert engine.final["b.1"].cached_tokens and engine.final["c"].cached_tokens > 500

    for name, prompt in prompts.items():
        found = torch.stack(engine.logits[name]).float()
        alone = alone_logits(decoder, prompt, engine.outputs[name], engine.final[name].levels).float()
        assert (found - alone).norm() <= 2e-2 * alone.norm(), name
        noise = (found - alone).abs().max()
        margins = alone.topk(2).values.diff().abs().squeeze(-1)
        # All positions that are sure, not only those before the first that is not: both read the same text.
        sure = (margins >= 2 * noise).nonzero().flatten()
        assert len(sure), f"nothing of request {name} is sure enough to compare"
        assert alone.argmax(-1)[sure].tolist() == [engine.outputs[name][i] for i in sure]


def alone_logits(decoder: PackedDecoder, prompt: list[int], output: list[int], levels: list[list[int]]) -> torch.Tensor:
    """Logits `[n_output, vocab]` of a request that runs alone, given its text and level history."""
    arena = decoder.arena(256 << 20)
    memory = RequestMemory(arena, decoder.n_layers, decoder.order[: levels[0][1]])
    tokens, done, logits = prompt + output, 0, []
    changes = dict(map(tuple, levels[1:]))
    level = levels[0][1]
    while done < len(tokens) - 1:
        for layer in decoder.order[level : changes.get(done, level)]:
            memory.fold(layer, decoder.mixers[layer], done)
        level = changes.get(done, level)
        end = min([len(prompt), *(at for at in changes if at > done)]) if done < len(prompt) else done + 1
        memory.reserve(end)
        batch = PackedBatch([Segment(memory, tokens[done:end], done, end >= len(prompt))])
        logits.append(decoder.forward(batch, arena))
        done = end
    return torch.cat(logits)
