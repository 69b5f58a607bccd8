"""Every family from a model folder to an adapter: trained, verified, folded, and run by both faces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsla.convert import Plan, Teacher, load_adapter
from dsla.convert.adapter import read_manifest
from dsla.convert.check import check_adapter
from dsla.convert.load import load_model
from dsla.convert.surgery import Levels
from dsla.distill import convert
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.families import attention_shape
from dsla.hub import model_hash
from tests.distill.tiny import RECIPE, TEXT, TinyTokenizer, write_text
from tests.engine.tiny import RecordingEngine
from tests.families.tiny import CONFIGS, random_model


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi", "phi, head norms", "phi3"])
def test_folder_is_converted_and_served(name: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "adapter"
    config = CONFIGS[name].from_dict(CONFIGS[name].to_dict() | {"vocab_size": 128})
    random_model(config).save_pretrained(folder)
    plan = Plan(Teacher("tiny", model_hash(folder), 3), (1, 2, 0))
    convert(load_model(folder), TinyTokenizer(), plan, dataclasses.replace(RECIPE, layers=2), write_text(tmp_path), out)
    for layer in (1, 2):
        errors = read_manifest(out)["layers"][str(layer)]["errors"]
        epoch = len(errors) // RECIPE.train.epochs
        assert sum(errors[epoch:]) < sum(errors[:epoch]), (
            f"layer {layer}: the same text is no better in the second epoch"
        )
    found = "\n".join(check_adapter(out, folder, torch.float32))
    assert "2 of 3 in the plan" in found and "0 equals the teacher bit for bit" in found

    adapter = load_adapter(out, attention_shape(config), plan.teacher.sha256, torch.float32)
    decoder = PackedDecoder.load(folder, adapter)
    engine = RecordingEngine(decoder, decoder.arena(1 << 22), EngineConfig(max_step_tokens=16))
    prompt = [ord(c) for c in TEXT[:40]]
    engine.add_request(prompt, SamplingParams(max_tokens=8, ignore_eos=True), request_id="x")
    for _ in range(4):
        engine.step()
    engine.set_level(2)
    engine.run()
    changed, level = engine.final["x"].levels[-1]
    assert (changed > 0, level) == (True, 2)

    model = load_model(folder)
    levels, tokens = Levels(model, adapter.plan, adapter.mixers), torch.tensor([prompt + engine.outputs["x"][:-1]])
    first = model(tokens[:, :changed], use_cache=True)
    levels.set(2)
    rest = model(tokens[:, changed:], past_key_values=first.past_key_values)
    expected = torch.cat([first.logits, rest.logits], 1)[0, len(prompt) - 1 :]
    torch.testing.assert_close(torch.stack(engine.logits["x"]), expected, rtol=1e-4, atol=1e-4)
