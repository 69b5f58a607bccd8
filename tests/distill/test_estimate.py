"""Estimates: FLOPs against torch's own count, passes against those that are made, and the model left as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dsla.convert.surgery import Levels
from dsla.distill import estimate as estimate_module
from dsla.distill.activations import Activations
from dsla.distill.estimate import estimate, layers_run, planned
from dsla.distill.flops import Costs, mean_level
from dsla.distill.layer import LayerTask
from dsla.distill.nested import level_backward
from dsla.distill.objective import layer_loss
from dsla.distill.recipe import OrderSettings, Recipe, StageSettings
from dsla.distill.trunk import Trunk
from dsla.families import attention_shape
from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity import make_plan
from dsla.sensitivity.costs import order_flops
from tests.distill.tiny import PLAN, RECIPE, TEACHER, teacher

LENGTH = 128
MIXERS = [
    DslaConfig(delta_rank=3),
    DslaConfig(window=0, sinks=0, mixing="head", delta_rank=0, gate_shape="vector", feature_map="elu"),
    DslaConfig(normalizer="state", gate_source="hidden", n_states=4),
]


def causal(q: torch.Size, *args: object, **options: object) -> int:
    """FLOPs of causal attention, which torch does not count on a CPU."""
    batch, heads, tokens, dim = q
    return 2 * batch * heads * tokens * tokens * dim


def counted(run: Callable[[], object]) -> int:
    """FLOPs by torch's count."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: causal}) as counter:
        run()
    return counter.get_total_flops()


def fresh(config: DslaConfig) -> tuple[Trunk, Levels, Costs]:
    model = teacher()
    mixers = {layer: DslaMixer(config, attention_shape(model.config)) for layer in PLAN.order}
    return Trunk(model), Levels(model, dataclasses.replace(PLAN, mixer=config), mixers), Costs(model, config)


@pytest.mark.parametrize("config", MIXERS, ids=["default", "vector", "hidden"])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_forward(config: DslaConfig, level: int) -> None:
    trunk, levels, costs = fresh(config)
    levels.set(level)
    tokens = torch.randint(0, 128, (2, LENGTH))
    with torch.no_grad():
        found = counted(lambda: trunk.head(trunk.norm(trunk.run(trunk.embed(tokens)))))
    assert tokens.numel() * costs.forward(LENGTH, level) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("config", MIXERS, ids=["default", "vector", "hidden"])
def test_steps(config: DslaConfig) -> None:
    trunk, levels, costs = fresh(config)
    tokens = torch.randint(0, 128, (2, LENGTH))
    softmax, layer = trunk.layers[0].self_attn, trunk.layers[0]
    levels.set(3)
    task = LayerTask(0, layer.self_attn, softmax, layer.input_layernorm, [trunk.embed(tokens)], [], trunk)

    def layer_step() -> None:
        x, target, position = task.question(task.inputs[0])
        layer_loss(task.attention, x, target, position, 0.01)[0].backward()

    assert tokens.numel() * costs.layer_step(LENGTH) == pytest.approx(counted(layer_step), rel=0.15)
    found = counted(lambda: level_backward(trunk, levels, tokens, 3, 1.0))
    assert tokens.numel() * costs.stage_step(LENGTH, 3) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 1, 2), (2, 0, 1), (2,), (1, 0)])
def test_passes_of_the_chain(order: tuple[int, ...]) -> None:
    activations, run = Activations(teacher(), [torch.randint(0, 128, (1, 8))]), [0]
    for layer in activations.trunk.layers:
        layer.register_forward_hook(lambda *_: run.__setitem__(0, run[0] + 1))
    for place, layer in enumerate(order):
        activations.at(layer)
        activations.changed(layer, order[place + 1 :])
    assert layers_run(order) == run[0]


def test_order() -> None:
    settings = OrderSettings("kl", also=("greedy",), windows=2, seq_len=LENGTH, candidates=2)
    model, config = teacher(), DslaConfig(window=4, sinks=1)
    tokens = torch.randint(0, 128, (2, LENGTH))
    found = counted(lambda: make_plan(model, TEACHER, tokens, config, settings))
    assert order_flops(Costs(model, config), settings) == pytest.approx(found, rel=0.35)


def test_phases_and_a_model_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageSettings(tokens=512, seq_len=32, batch_tokens=64, valid_tokens=64)
    recipe = dataclasses.replace(RECIPE, stages=(stage, dataclasses.replace(stage, name="long", seq_len=64)))
    model, random = teacher(), torch.get_rng_state()
    before = model(torch.arange(20)[None]).logits
    phases = estimate(model, recipe, PLAN.order, order_flops=1e9)
    names = [f"order by {recipe.order.metric}", "chain, inputs", "chain, training", "stage nested", "stage long"]
    assert [phase.name for phase in phases] == names
    assert torch.equal(model(torch.arange(20)[None]).logits, before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "mixer" not in name)
    assert torch.equal(torch.get_rng_state(), random)
    assert phases[2].tokens == 2 * 3 * 512 and phases[3].tokens == 512
    assert all(0 < phase.seconds < 60 and phase.flops > 0 for phase in phases)
    assert [phase.name for phase in estimate(model, recipe, PLAN.order, chain=False)] == names[3:]

    now = iter(range(10**6))
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: float(next(now)))
    costs, sample = Costs(model, recipe.mixer), 64
    training = estimate(model, recipe, PLAN.order)[1]
    # A sample of 64 tokens is said to take a second.
    at_that_speed = 3 * 512 * costs.layer_steps(32, 2) / (sample * costs.layer_step(32))
    assert training.seconds == pytest.approx(at_that_speed)


def test_mean_level() -> None:
    assert (mean_level(1), mean_level(3), mean_level(30)) == (1, 2, 22)


def test_gpu_recipe_fits_its_time_at_the_speed_it_assumes() -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    recipe = Recipe.load(Path(__file__).parents[2] / "recipes" / "smollm2-135m-gpu.yaml")
    costs = Costs(model, recipe.mixer)
    speeds = SimpleNamespace(forward=30e12, layer=5e12, stage=lambda settings: 30e12)
    phases = planned(costs, speeds, recipe, None, order_flops(costs, recipe.order))
    assert [phase.name for phase in phases][3:] == ["stage nested", "stage long"]
    assert 5 * 60 < sum(phase.seconds for phase in phases) < 12 * 60, "the rest is reading, loading, resuming"
