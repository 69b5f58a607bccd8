"""The chain: layers are converted one after the other, each inside the model that already holds the ones before it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsla.convert.adapter import cast, save_layer, stored_weights
from dsla.convert.plan import Plan
from dsla.convert.surgery import Levels
from dsla.distill.activations import Activations
from dsla.distill.data import read_documents, token_windows
from dsla.distill.layer import LayerTask, train_layer, valid_errors
from dsla.distill.output import begin, resume
from dsla.distill.recipe import Recipe
from dsla.errors import PlanError, TrainingError
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaMixer


@dataclass(frozen=True)
class Progress:
    """Where a conversion stands.

    Attributes:
        phase: `data`, `inputs` (forward to the layer), `train`, `done` (layer finished) or `kept` (finished earlier).
        layer: layer index, -1 before the first.
        position: how many layers of the order are finished.
        layers: how many will be.
        step: steps of the phase done.
        steps: steps of the phase.
        error: relative squared error: of the step, or of held-out text when `done`.
        tokens: tokens the phase has gone through.
        seconds: seconds the phase has taken.
    """

    phase: str
    layer: int
    position: int
    layers: int
    step: int = 0
    steps: int = 0
    error: float = float("nan")
    tokens: int = 0
    seconds: float = 0.0


def convert(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    recipe: Recipe,
    data: Sequence[Path],
    out: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    checkpoint_seconds: float = 60.0,
) -> None:
    """Converts a model layer by layer in the plan's order; goes on where an earlier, interrupted call stopped.

    Args:
        model: the teacher, a Hugging Face causal language model of a supported family; converted in place.
        tokenizer: its tokenizer.
        plan: order and teacher; its mixer settings are replaced by the recipe's.
        recipe: data, mixer and training settings.
        data: training text, see `read_documents`.
        out: the adapter's folder, created if needed.
        on_progress: called at least once a step.
        checkpoint_seconds: seconds between checkpoints within a layer.

    Raises:
        DataError: if the text is empty, binary or too short.
        PlanError: if the plan has fewer layers than the recipe asks for, or is for another number of layers.
        AdapterError: if `out` holds an adapter of another teacher, order, mixer or text, or cannot be written.
        TrainingError: if a loss or gradient is not finite.
    """
    if plan.teacher.n_layers != model.config.num_hidden_layers:
        raise PlanError(
            f"the plan is for {plan.teacher.n_layers} layers, the model has {model.config.num_hidden_layers}"
        )
    plan = dataclasses.replace(plan, mixer=recipe.mixer)
    wanted = plan.layers(recipe.layers or plan.max_level)
    count = len(wanted)
    done = resume(out, plan, recipe, data, model)
    on_progress(Progress("data", -1, len(done or {}), count))
    if done is None or len(done) < count:
        tokens = training_windows(tokenizer, data, recipe)
        if done is None:
            begin(out, plan, recipe, data, model)
        _run(model, plan, wanted, recipe, tokens, done or {}, out, on_progress, checkpoint_seconds)
    shutil.rmtree(out / "progress", ignore_errors=True)


def training_windows(tokenizer: Any, data: Sequence[Path], recipe: Recipe) -> torch.Tensor:
    """The token windows `[n, seq_len]` a recipe trains on, those held out first.

    Raises:
        DataError: if the text is empty, binary or too short.
    """
    settings = recipe.data
    windows = (settings.tokens + settings.valid_tokens) // settings.seq_len
    return token_windows(tokenizer, read_documents(data), settings.seq_len, windows, recipe.seed)


def _run(
    model: Any, plan: Plan, wanted: Sequence[int], recipe: Recipe, tokens: torch.Tensor, done: dict[int, DslaMixer], out: Path,
    on_progress: Callable[[Progress], None], checkpoint_seconds: float,
) -> None:  # fmt: skip
    family, shape, dtype = family_of(model.config), attention_shape(model.config), next(model.parameters()).dtype
    device = next(model.parameters()).device
    layers = model.get_submodule(family.layers)
    softmax = {layer: getattr(layers[layer], family.attention) for layer in wanted}
    mixers = {layer: done.get(layer) or _new_mixer(recipe, shape, layer).to(device) for layer in wanted}
    levels = Levels(model, plan, mixers)
    batch = recipe.train.batch_tokens // recipe.data.seq_len
    activations = Activations(model, tokens, batch)
    n_valid = recipe.data.valid_tokens // recipe.data.seq_len

    for position, layer in enumerate(wanted):
        if layer in done:
            on_progress(Progress("kept", layer, position + 1, len(wanted)))
            continue
        levels.set(position)
        report = _Reporter(on_progress, layer, position, len(wanted), recipe.data.seq_len)
        begun = time.monotonic()
        report.start("inputs", 1)
        inputs = activations.at(layer, report)
        levels.set(position + 1)
        attention = getattr(layers[layer], family.attention)
        norm = layers[layer].get_submodule(family.attention_norm)
        task = LayerTask(
            layer, attention, softmax[layer], norm, inputs[n_valid:], inputs[:n_valid], activations.position
        )
        report.start("train", batch)
        mixer = mixers[layer]
        mixer.train().requires_grad_(True)
        try:
            errors = train_layer(
                task,
                recipe.train,
                recipe.seed + layer,
                out / "progress" / "layer.safetensors",
                checkpoint_seconds,
                report.step,
            )
        except OSError as error:
            raise TrainingError(
                f"cannot write a checkpoint to {out}: {error.strerror or error}; finished layers are intact"
            ) from error
        mixer.load_state_dict(stored_weights(mixer))
        cast(mixer, dtype).eval().requires_grad_(False)
        found = valid_errors(task)
        if not math.isfinite(found["error"]):
            raise TrainingError(
                f"layer {layer} gives output that is not finite: lower train.lr; finished layers are intact"
            )
        seconds = time.monotonic() - begun
        record = {
            "position": position,
            "train": dataclasses.asdict(recipe.train),
            "tokens": len(errors) * batch * recipe.data.seq_len,
            "seconds": round(seconds, 1),
            "valid": found,
            "errors": errors,
        }
        save_layer(out, layer, mixer, record)
        activations.changed(layer, wanted[position + 1 :])
        on_progress(Progress("done", layer, position + 1, len(wanted), error=found["error"], seconds=seconds))


def _new_mixer(recipe: Recipe, shape: Any, layer: int) -> DslaMixer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1009 + layer)
        return DslaMixer(recipe.mixer, shape)


class _Reporter:
    """Turns counts into `Progress`, with the phase's own clock."""

    def __init__(
        self, on_progress: Callable[[Progress], None], layer: int, position: int, layers: int, seq_len: int
    ) -> None:
        self._send, self._seq_len = on_progress, seq_len
        self._layer, self._position, self._layers = layer, position, layers

    def start(self, phase: str, windows_a_step: int) -> None:
        self._phase, self._windows, self._begun = phase, windows_a_step, time.monotonic()
        self._first = -1

    def __call__(self, done: int, total: int) -> None:
        self.step(done, total, float("nan"))

    def step(self, done: int, total: int, error: float) -> None:
        self._first = done - 1 if self._first < 0 else self._first
        self._send(
            Progress(
                self._phase,
                self._layer,
                self._position,
                self._layers,
                done,
                total,
                error,
                tokens=(done - self._first) * self._windows * self._seq_len,
                seconds=time.monotonic() - self._begun,
            )  # fmt: skip
        )
