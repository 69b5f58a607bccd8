"""The chain: layers are converted one after the other, each inside the model that already holds the ones before it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsla.convert.adapter import cast, save_layer, stored_weights
from dsla.convert.plan import Plan
from dsla.convert.surgery import Levels
from dsla.distill import parallel
from dsla.distill.activations import Activations
from dsla.distill.data import (
    Source,
    TeacherText,
    TrainingText,
    check_sources,
    check_tokenizer,
    text_for,
)
from dsla.distill.data.teacher import teacher_sources
from dsla.distill.descent import Meter
from dsla.distill.flops import Costs
from dsla.distill.layer import LayerTask, train_layer, valid_errors
from dsla.distill.output import begin, resume
from dsla.distill.part import Part
from dsla.distill.recipe import Recipe
from dsla.distill.stages import OnStage, train_stages
from dsla.errors import PlanError, TrainingError
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaMixer


@dataclass(frozen=True)
class Progress:
    """Where a conversion stands.

    Attributes:
        phase: `text` (the teacher writes it), `data`, `inputs` (forward to the layer), `train`, `done` (layer finished) or
            `kept` (finished earlier).
        layer: layer index, -1 before the first.
        position: how many layers of the order are finished.
        layers: how many will be.
        step: steps of the phase done.
        steps: steps of the phase.
        error: relative squared error: of the step, or of held-out text when `done`.
        tokens: tokens the phase has gone through.
        seconds: seconds the phase has taken.
        speed: `tokens_per_second` and `flop_per_second` of a layer's training, when `done`.
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
    speed: dict[str, float] = field(default_factory=dict)


def convert(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    recipe: Recipe,
    data: Sequence[Source | TeacherText],
    out: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stage: OnStage = lambda stage, phase, done, total, kl: None,
    part: Part | None = None,
) -> list[dict[str, Any]]:
    """Converts a model: layer by layer in the plan's order, then in the recipe's stages, all layers together.

    It goes on where an earlier, interrupted call stopped.

    Args:
        model: the teacher, a Hugging Face causal language model of a supported family; converted in place.
        tokenizer: its tokenizer.
        plan: order and teacher; its mixer settings are replaced by the recipe's.
        recipe: data, mixer and training settings.
        data: where the training text comes from.
        out: the adapter's folder, created if needed.
        on_progress: called at least once a step of a layer.
        on_stage: called after every step of a stage.
        part: how long this call may take. Default: as long as it needs.

    Returns:
        The records of the stages run.

    Raises:
        DataError: if the text is empty, binary or too short, or the tokenizer is not the model's.
        ConfigError: if batches have too few rows for several processes.
        PlanError: if the plan has fewer layers than the recipe asks for, or is for another number of layers.
        AdapterError: if `out` holds an adapter of another teacher, order, mixer or text, or cannot be written.
        TrainingError: if a loss or gradient is not finite.
        TimeUp: if the time of this call is over.
    """
    part = part or Part()
    if plan.teacher.n_layers != model.config.num_hidden_layers:
        raise PlanError(
            f"the plan is for {plan.teacher.n_layers} layers, the model has {model.config.num_hidden_layers}"
        )
    plan = dataclasses.replace(plan, mixer=recipe.mixer)
    wanted = plan.layers(recipe.layers or plan.max_level)
    count = len(wanted)
    parallel.check_rows("train", recipe.train.batch_tokens, recipe.data.seq_len)
    check_tokenizer(tokenizer, model)
    check_sources(data, recipe.data.tokens + recipe.data.valid_tokens)
    writing = _Reporter(on_progress, -1, 0, count)
    writing.start("text", sum(source.tokens for source in data if isinstance(source, TeacherText)))

    def written(done: int, tokens: int) -> None:
        writing(done, tokens)
        part.kept(f"{done} of {tokens} tokens of the teacher's text")

    sources = teacher_sources(data, model, tokenizer, recipe.data.seq_len, recipe.seed, out, written)
    done = parallel.leader_first(lambda: resume(out, plan, recipe, sources, model))
    on_progress(Progress("data", -1, len(done or {}), count))
    missing = done is None or len(done) < count
    text = training_text(model, tokenizer, sources, recipe) if missing else None
    if done is None and parallel.leads():
        begin(out, plan, recipe, sources, model)
    device, shape = next(model.parameters()).device, attention_shape(model.config)
    mixers = {layer: (done or {}).get(layer) or _new_mixer(recipe, shape, layer).to(device) for layer in wanted}
    levels = Levels(model, plan, mixers)
    if text is not None:
        _run(model, levels, wanted, recipe, text, set(done or ()), out, on_progress, part)
    levels.set(0)
    records = train_stages(model, tokenizer, levels, recipe, sources, out, part, on_stage)
    if parallel.leads():
        shutil.rmtree(out / "progress", ignore_errors=True)
    return records


def training_text(model: Any, tokenizer: Any, sources: Sequence[Source], recipe: Recipe) -> TrainingText:
    """The text that the layers of a recipe are trained on and measured on.

    Raises:
        DataError: if the text is empty, binary or too short, or has tokens that the model does not know.
    """
    return text_for(model, tokenizer, sources, recipe.data, recipe.train.batch_tokens, recipe.seed)


def _run(
    model: Any, levels: Levels, wanted: Sequence[int], recipe: Recipe, text: TrainingText, done: set[int], out: Path,
    on_progress: Callable[[Progress], None], part: Part,
) -> None:  # fmt: skip
    activations = Activations(model, [*text.valid, *(parallel.own(batch) for batch in text.train)])
    family, dtype, mixers = family_of(model.config), next(model.parameters()).dtype, levels.mixers
    layers = model.get_submodule(family.layers)
    softmax = {layer: getattr(layers[layer], family.attention) for layer in wanted}
    held_out = len(text.valid)
    trained = sum(batch.numel() for batch in text.train)
    read = trained + sum(batch.numel() for batch in text.valid)

    costs = Costs(model, recipe.mixer)
    flops = sum(batch.numel() * costs.layer_steps(batch.shape[1], recipe.train.epochs) for batch in text.train)

    for position, layer in enumerate(wanted):
        if layer in done:
            on_progress(Progress("kept", layer, position + 1, len(wanted)))
            continue
        levels.set(position)
        report = _Reporter(on_progress, layer, position, len(wanted))
        begun = time.monotonic()
        report.start("inputs", read)
        inputs = activations.at(layer, report)
        levels.set(position + 1)
        attention = getattr(layers[layer], family.attention)
        norm = layers[layer].get_submodule(family.attention_norm)
        task = LayerTask(
            layer, attention, softmax[layer], norm, inputs[held_out:], inputs[:held_out], activations.trunk
        )
        report.start("train", recipe.train.epochs * trained)
        mixer = mixers[layer]
        mixer.train().requires_grad_(True)
        meter = Meter(report.step, recipe.train.epochs * trained, flops)
        try:
            with parallel.gathered(layers[layer]):
                checkpoint = out / "progress" / "layer.safetensors"
                errors = train_layer(task, recipe.train, recipe.seed + layer, checkpoint, part, meter)
                mixer.load_state_dict(stored_weights(mixer))
                cast(mixer, dtype).eval().requires_grad_(False)
                found = valid_errors(task)
        except OSError as error:
            raise TrainingError(
                f"cannot write a checkpoint to {out}: {error.strerror or error}; finished layers are intact"
            ) from error
        if not math.isfinite(found["error"]):
            raise TrainingError(
                f"layer {layer} gives output that is not finite: lower train.lr; finished layers are intact"
            )
        seconds = time.monotonic() - begun
        record = {
            "position": position,
            "train": dataclasses.asdict(recipe.train),
            "tokens": recipe.train.epochs * trained,
            "seconds": round(seconds, 1),
            **meter.speed,
            "valid": found,
            "errors": errors,
        }
        if parallel.leads():
            save_layer(out, layer, mixer, record)
        activations.changed(layer, wanted[position + 1 :])
        on_progress(
            Progress("done", layer, position + 1, len(wanted), error=found["error"], seconds=seconds, speed=meter.speed)
        )
        part.kept(f"layer {layer} done")


def _new_mixer(recipe: Recipe, shape: Any, layer: int) -> DslaMixer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1009 + layer)
        return DslaMixer(recipe.mixer, shape)


class _Reporter:
    """Turns counts into `Progress`, with the phase's own clock."""

    def __init__(self, on_progress: Callable[[Progress], None], layer: int, position: int, layers: int) -> None:
        self._send = on_progress
        self._layer, self._position, self._layers = layer, position, layers

    def start(self, phase: str, tokens: int) -> None:
        self._phase, self._tokens, self._begun = phase, tokens, time.monotonic()
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
                tokens=round((done - self._first) / total * self._tokens),
                seconds=time.monotonic() - self._begun,
            )  # fmt: skip
        )
