"""Time and tokens of a conversion before it starts: counted work, at the speed of a few steps measured on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from dsla.convert.plan import Plan, Teacher
from dsla.convert.surgery import ConvertedAttention, Levels
from dsla.distill import parallel
from dsla.distill.activations import still_of_use
from dsla.distill.flops import Costs, mean_level
from dsla.distill.layer import LayerTask
from dsla.distill.nested import checked_levels, level_backward
from dsla.distill.objective import layer_loss
from dsla.distill.recipe import Recipe, StageSettings
from dsla.distill.trunk import Trunk
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaMixer
from dsla.ops.shapes import state_dtype

_SAMPLE_ON_CPU = 512


@dataclass(frozen=True)
class Phase:
    """A part of a conversion.

    Attributes:
        name: what it does.
        tokens: tokens it goes through, passes counted one by one.
        flops: what it computes.
        seconds: how long that takes.
    """

    name: str
    tokens: int
    flops: float
    seconds: float


def estimate(
    model: Any, recipe: Recipe, order: Sequence[int] | None, order_flops: float = 0.0, chain: bool = True
) -> list[Phase]:
    """The phases of a recipe: order, chain and stages. Reading the text is not among them, nor is writing it.

    Args:
        model: the teacher; it is as before afterwards.
        recipe: what is asked for.
        order: the layers that are converted, in their order. Default: it is measured first, and taken to be a random one.
        order_flops: what measuring the order computes.
        chain: whether layers are trained one by one; otherwise only the stages are.
    """
    costs = Costs(model, recipe.mixer)
    return planned(costs, _Measured(model, recipe, costs), recipe, order, order_flops, chain)


class Speeds(Protocol):
    """FLOP/s of the parts of a conversion."""

    @property
    def forward(self) -> float:
        """Of the teacher's layers."""

    @property
    def layer(self) -> float:
        """Of a layer's training."""

    def stage(self, settings: StageSettings) -> float:
        """Of all layers trained together."""


def planned(
    costs: Costs, speeds: Speeds, recipe: Recipe, order: Sequence[int] | None, order_flops: float, chain: bool = True
) -> list[Phase]:
    """The phases at given speeds.

    Args:
        costs: of the model.
        speeds: of the machine.
        recipe: what is asked for.
        order: as for `estimate`, like all that follows.
        order_flops: see there.
        chain: see there.
    """
    phases = []
    if order_flops:
        tokens = recipe.order.all_windows * recipe.order.seq_len
        name = f"order by {recipe.order.metric}"
        phases.append(Phase(name, tokens, order_flops, order_flops / speeds.forward))
    if order is None:
        order = random.Random(recipe.seed).sample(range(costs.n_layers), recipe.layers or costs.n_layers)
    if chain:
        data, epochs = recipe.data, recipe.train.epochs
        read = layers_run(order) * (data.tokens + data.valid_tokens)
        flops = float(read * costs.block(data.seq_len))
        phases.append(Phase("chain, inputs", read // costs.n_layers, flops, flops / speeds.forward))
        trained = len(order) * data.tokens
        flops = float(trained * costs.layer_steps(data.seq_len, epochs))
        phases.append(Phase("chain, training", epochs * trained, flops, flops / speeds.layer))
    for stage in recipe.stages:
        flops = float(stage.tokens * costs.stage_step(stage.seq_len, mean_level(len(order))))
        checked = (0, *checked_levels(len(order), stage.checks))
        checking = 2.0 * stage.valid_tokens * sum(costs.forward(stage.seq_len, level) for level in checked)
        seconds = flops / speeds.stage(stage) + checking / speeds.forward
        phases.append(Phase(f"stage {stage.name}", stage.tokens, flops + checking, seconds))
    return phases


def layers_run(order: Sequence[int]) -> int:
    """How many layers the chain runs its text through to reach the layers of an order, one after the other."""
    held: list[int] = []
    run = 0
    for place, layer in enumerate(order):
        run += layer - max((i for i in held if i <= layer), default=0)
        held = still_of_use({*held, layer}, layer, order[place + 1 :])
    return run


class _Measured:
    """FLOP/s of all processes, measured when first asked for: the second of two runs on text of a few hundred tokens, or of
    a whole batch on a GPU.
    """

    def __init__(self, model: Any, recipe: Recipe, costs: Costs) -> None:
        self._model, self._recipe, self._costs = model, recipe, costs
        self._trunk, self._family = Trunk(model), family_of(model.config)
        self._generator = torch.Generator().manual_seed(recipe.seed)

    @cached_property
    def forward(self) -> float:
        rows = self._text(self._recipe.train.batch_tokens, self._recipe.data.seq_len, 1)
        flops = rows.numel() * self._costs.n_layers * self._costs.block(rows.shape[1])
        return self._measured(torch.no_grad()(lambda: self._trunk.run(self._trunk.embed(rows))), flops)

    @cached_property
    def layer(self) -> float:
        rows = self._text(self._recipe.train.batch_tokens, self._recipe.data.seq_len, 1)
        layer = self._trunk.layers[0]
        softmax, norm = getattr(layer, self._family.attention), layer.get_submodule(self._family.attention_norm)
        attention = ConvertedAttention(softmax, self._mixer(), self._family)
        optimizer = torch.optim.AdamW(attention.mixer.parameters())
        task = LayerTask(0, attention, softmax, norm, [self._trunk.embed(rows)], [], self._trunk)

        def step() -> None:
            x, target, position = task.question(task.inputs[0])
            loss, _ = layer_loss(attention, x, target, position, self._recipe.train.gate_contrast)
            loss.backward()
            optimizer.step()

        with parallel.gathered(layer):
            return self._measured(step, rows.numel() * self._costs.layer_step(rows.shape[1]))

    def stage(self, settings: StageSettings) -> float:
        rows = self._text(settings.batch_tokens, settings.seq_len, 2)
        order = tuple(range(self._costs.n_layers))
        plan = Plan(Teacher("", "", len(order)), order, self._recipe.mixer)
        levels = Levels(self._model, plan, {layer: self._mixer() for layer in order})
        parameters = [p for mixer in levels.mixers.values() for p in mixer.parameters()]
        optimizer = torch.optim.AdamW(parameters)
        level = mean_level(len(order))

        def step() -> None:
            for half in (rows[0::2], rows[1::2]):
                level_backward(self._trunk, levels, half, level, 1.0)
            parallel.add_gradients(parameters)
            optimizer.step()

        try:
            return self._measured(step, rows.numel() * self._costs.stage_step(rows.shape[1], level))
        finally:
            levels.set(0)

    def _text(self, batch_tokens: int, seq_len: int, least: int) -> Tensor:
        """Random rows: those of one process, or on a CPU some that take no longer than a few seconds."""
        if self._trunk.device.type == "cpu":
            batch_tokens, seq_len = min(batch_tokens, _SAMPLE_ON_CPU), min(seq_len, _SAMPLE_ON_CPU // least)
        rows = max(batch_tokens // seq_len // parallel.processes(), least)
        tokens = torch.randint(0, self._model.config.vocab_size, (rows, seq_len), generator=self._generator)
        return tokens.to(self._trunk.device)

    def _mixer(self) -> DslaMixer:
        with torch.random.fork_rng(devices=[]):
            mixer = DslaMixer(self._recipe.mixer, attention_shape(self._model.config))
        return mixer.to(self._trunk.device, state_dtype(self._trunk.dtype))

    def _measured(self, run: Callable[[], object], flops: float) -> float:
        for _ in range(2):
            self._synchronize()
            begun = time.perf_counter()
            run()
            self._synchronize()
        return parallel.processes() * flops / (time.perf_counter() - begun)

    def _synchronize(self) -> None:
        if self._trunk.device.type == "cuda":
            torch.cuda.synchronize(self._trunk.device)
