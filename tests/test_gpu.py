"""The same code on a CUDA device: order, conversion, both faces of the model. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsla.convert import load_adapter
from dsla.convert.surgery import Levels
from dsla.distill import convert
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.engine.weights import build_weights
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig
from dsla.ops import chunk_dsla, fold_kv, naive_dsla
from dsla.sensitivity import make_plan
from tests.distill.tiny import PLAN, RECIPE, TEACHER, TEXT, TinyTokenizer, teacher
from tests.engine.tiny import RecordingEngine
from tests.ops.test_dsla import random_inputs, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_ops_match_naive(gate: str) -> None:
    inputs = [x.cuda() for x in random_inputs(2, 333, gate, torch.float32, extreme=True)]
    expected, state = naive_dsla(*inputs)
    o, final = chunk_dsla(*inputs)
    assert relative_error(o, expected) < 1e-5 and relative_error(final, state) < 1e-5
    assert relative_error(fold_kv(*inputs[1:]), state) < 1e-5


def test_order_conversion_and_both_faces(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    plan = make_plan(teacher().cuda(), TEACHER, tokens, DslaConfig(window=4, sinks=1), "kl")
    assert sorted(plan.order) == [0, 1, 2]
    convert(teacher().cuda(), TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "out")

    model = teacher()
    config, shape = model.config, attention_shape(model.config)
    on_cpu = load_adapter(tmp_path / "out", shape, TEACHER.sha256, torch.float32)
    on_gpu = load_adapter(tmp_path / "out", shape, TEACHER.sha256, torch.float32, "cuda")
    Levels(model, on_cpu.plan, on_cpu.mixers).set(3)
    expected = model(tokens).logits
    moved = teacher().cuda()
    Levels(moved, on_gpu.plan, on_gpu.mixers).set(3)
    torch.testing.assert_close(moved(tokens.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)

    family = family_of(config)
    weights = build_weights(teacher().state_dict(), config, family, torch.float32, "cuda")
    decoder = PackedDecoder(weights, config, family, on_gpu.mixers)
    engine = RecordingEngine(decoder, decoder.arena(1 << 22), EngineConfig(level=3, max_step_tokens=16))
    engine.add_request(tokens[0].tolist(), SamplingParams(max_tokens=1, ignore_eos=True), request_id="x")
    engine.run()
    torch.testing.assert_close(engine.logits["x"][0].cpu(), expected[0, -1], rtol=1e-3, atol=1e-3)
