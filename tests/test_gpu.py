"""The same code on a CUDA device: order, conversion, in parts too, both faces of the model. Skipped where there is none."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsla.convert import load_adapter
from dsla.convert.adapter import layer_file
from dsla.convert.surgery import Levels
from dsla.distill import convert
from dsla.distill.activations import Activations
from dsla.distill.data import Source
from dsla.distill.estimate import estimate
from dsla.distill.layer import LayerTask
from dsla.distill.nested import level_backward
from dsla.distill.objective import layer_loss
from dsla.distill.part import Part, TimeUp
from dsla.distill.recipe import OrderSettings, Recipe, StageSettings
from dsla.distill.trunk import Trunk
from dsla.engine import EngineConfig, PackedDecoder, SamplingParams
from dsla.engine.weights import build_weights
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from dsla.ops import chunk_dsla, fold_kv, naive_dsla
from dsla.sensitivity import make_plan
from tests.distill.tiny import PLAN, RECIPE, TEACHER, TinyTokenizer, teacher, write_text
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
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    plan = make_plan(teacher().cuda(), TEACHER, tokens, DslaConfig(window=4, sinks=1), OrderSettings("kl", ("greedy",)))
    assert sorted(plan.order) == [0, 1, 2]
    convert(teacher().cuda(), TinyTokenizer(), PLAN, RECIPE, write_text(tmp_path), tmp_path / "out")

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


def in_parts(recipe: Recipe, text: list[Source], out: Path, minutes: float) -> int:
    """Converts in as many parts as it takes; how many were cut short."""
    cuts = 0
    while True:
        try:
            convert(teacher().cuda(), TinyTokenizer(), PLAN, recipe, text, out, part=Part(minutes))
        except TimeUp:
            cuts += 1
        else:
            return cuts


def test_parts_of_chain_and_stage_end_in_the_same_weights(tmp_path: Path) -> None:
    stage = StageSettings(tokens=2048, seq_len=32, batch_tokens=64, valid_tokens=64, lr=0.003, tolerance=9.0)
    recipe, text = dataclasses.replace(RECIPE, stages=(stage,)), write_text(tmp_path)
    assert in_parts(recipe, text, tmp_path / "whole", math.inf) == 0
    # Losses are read every 16 steps: one part for each layer's 16, and for its end; two and one for the stage's 32.
    assert in_parts(recipe, text, tmp_path / "parts", 0.0) == 3 * 2 + 3
    for layer in PLAN.order:
        whole, parts = (load_file(tmp_path / name / layer_file(layer, "nested")) for name in ("whole", "parts"))
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=2**-7, atol=1e-4)


def test_steps_never_wait_for_the_gpu() -> None:
    model = teacher().cuda()
    shape = attention_shape(model.config)
    levels = Levels(model, PLAN, {layer: DslaMixer(PLAN.mixer, shape).cuda() for layer in PLAN.order})
    trunk, tokens = Trunk(model), torch.randint(0, 128, (4, 128), device="cuda")
    softmax, norm = trunk.layers[1].self_attn, trunk.layers[1].input_layernorm
    levels.set(3)
    task = LayerTask(1, trunk.layers[1].self_attn, softmax, norm, [trunk.embed(tokens)], [], trunk)

    def steps() -> None:
        x, target, position = task.question(task.inputs[0])
        layer_loss(task.attention, x, target, position, 0.01)[0].backward()
        level_backward(trunk, levels, tokens, 2, 1.0)

    steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inputs_on_the_host_are_those_on_the_device() -> None:
    tokens = torch.randint(0, 128, (4, 32)).split(2)
    on_host, on_device = Activations(teacher().cuda(), tokens, room=0), Activations(teacher().cuda(), tokens)
    for layer in (1, 3):
        for x, y in zip(on_host.at(layer), on_device.at(layer), strict=True):
            assert x.is_pinned() and y.is_cuda and torch.equal(x.cuda(), y)


def test_estimate() -> None:
    phases = estimate(teacher().cuda(), RECIPE, PLAN.order)
    assert [phase.name for phase in phases] == ["chain, inputs", "chain, training"]
    assert all(phase.seconds > 0 for phase in phases)
