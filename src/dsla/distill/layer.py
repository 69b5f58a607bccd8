"""Training one layer, in steps that can be killed and resumed with the same result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsla.convert.surgery import ConvertedAttention
from dsla.distill import parallel
from dsla.distill.descent import Descent, Values, descend
from dsla.distill.objective import layer_loss, relative_error, teacher_output
from dsla.distill.part import Part
from dsla.distill.recipe import TrainSettings
from dsla.distill.trunk import Trunk


@dataclass
class LayerTask:
    """One layer to train.

    Attributes:
        index: layer index.
        attention: the converted attention; its mixer is what is trained.
        teacher: the softmax attention it replaces.
        norm: the norm before it.
        inputs: the layer's inputs, `[rows, length, hidden]` for each batch.
        valid: inputs never trained on.
        trunk: the model they belong to.
    """

    index: int
    attention: ConvertedAttention
    teacher: nn.Module
    norm: nn.Module
    inputs: Sequence[Tensor]
    valid: Sequence[Tensor]
    trunk: Trunk

    def question(
        self, x: Tensor, target: Tensor | None = None, shift: int = 0
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The layer's normalised input, what the teacher makes of it, and the rotary embedding, from a batch of inputs.

        A `target` that is known from an earlier time is not computed again; the first token is at position `shift`.
        """
        x = self.norm(x.to(self.trunk.device, non_blocking=True))
        if target is None:
            target = teacher_output(self.teacher, x, self.trunk.position(x.shape[1]))
        return x, target, self.trunk.position(x.shape[1], shift)


def train_layer(
    task: LayerTask,
    settings: TrainSettings,
    seed: int,
    checkpoint: Path,
    part: Part,
    on_step: Callable[[int, int, float], None],
) -> list[float]:
    """Trains the mixer of `task` in place.

    Everything a step does follows from the seed and its number, so a run resumed from `checkpoint` ends in the same weights.

    Args:
        task: the layer.
        settings: optimisation.
        seed: of the order of batches, another one each epoch.
        checkpoint: where weights and optimiser state are kept meanwhile; one of another layer, seed or settings is not used.
        part: how long this call may take.
        on_step: called with (step, steps, loss) for every step.

    Returns:
        Relative squared error of each step.

    Raises:
        TrainingError: if loss or gradient is not finite, naming layer and step; the last checkpoint stays.
        TimeUp: if the time of this call is over.
    """
    mixer, batches = task.attention.mixer, len(task.inputs)
    optimizer = torch.optim.AdamW(mixer.parameters(), settings.lr, weight_decay=settings.weight_decay)
    tokens = sum(x.shape[:2].numel() for x in task.inputs)
    run = json.dumps([task.index, asdict(settings), seed, batches, tokens, parallel.processes()])
    targets: dict[int, Tensor] = {}

    def backward(step: int) -> Values:
        epoch, place = divmod(step, batches)
        order = torch.randperm(batches, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        chosen = order[place]
        inputs = task.inputs[chosen]
        dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
        shift = task.trunk.draw_shift(inputs.shape[1], dice)
        x, target, position = task.question(inputs, targets.get(chosen), shift)
        if settings.epochs > 1:
            targets[chosen] = target
        loss, error = layer_loss(task.attention, x, target, position, settings.gate_contrast)
        loss.backward()
        return error, {"the loss": loss}

    descent = Descent(
        mixer, optimizer, settings.epochs * batches, settings.lr, settings.warmup, settings.grad_clip, checkpoint, run,
        f"layer {task.index}", "lower train.lr; finished layers are intact",
    )  # fmt: skip
    return descend(descent, backward, part, on_step)


@torch.no_grad()
def valid_errors(task: LayerTask) -> dict[str, float]:
    """Relative squared error on text never trained on, averaged over its tokens: of the layer, and with its states off."""
    mixer, found = task.attention.mixer, {}
    for name, off in (("error", frozenset[int]()), ("error_states_off", mixer.all_states)):
        mixer.states_off = off
        total = 0.0
        for inputs in task.valid:
            x, target, position = task.question(inputs)
            total += float(relative_error(task.attention(x, position)[0], target)) * inputs.shape[:2].numel()
        found[name] = total / sum(inputs.shape[:2].numel() for inputs in task.valid)
    mixer.states_off = frozenset()
    return found
