"""Steps of an optimiser that can be stopped and resumed with the same result. What is minimised is the callers' matter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsla.distill import parallel
from dsla.distill.checkpoint import restore, store
from dsla.distill.part import Part
from dsla.errors import TrainingError

_STEPS_AT_ONCE = 16

Values = tuple[Tensor, dict[str, Tensor]]
"""What is recorded of a step, and what must be finite by its name; scalars on the model's device."""


@dataclass(frozen=True)
class Descent:
    """How a module is trained.

    Attributes:
        module: what is trained.
        optimizer: of its parameters.
        steps: steps in all.
        lr: peak learning rate (cosine to a tenth).
        warmup: share of the steps the rate rises over.
        grad_clip: largest gradient norm.
        checkpoint: where weights and optimiser state are kept meanwhile.
        run: names the training; a checkpoint of another one is not used.
        where: what is trained, for messages.
        advice: what to do if it fails.
    """

    module: nn.Module
    optimizer: torch.optim.AdamW
    steps: int
    lr: float
    warmup: float
    grad_clip: float
    checkpoint: Path
    run: str
    where: str
    advice: str


def descend(
    task: Descent, backward: Callable[[int], Values], part: Part, on_step: Callable[[int, int, float], None]
) -> list[float]:
    """Takes the steps that are left, and writes a checkpoint whenever one is due.

    On a GPU, losses are read some steps late, so that it never waits for the CPU; a loss that is not finite is then found
    within that many steps, and always before a checkpoint.

    Args:
        task: how.
        backward: step -> `Values`, with the gradients added up in the module's parameters. All it does follows from the
            number of the step.
        part: how long this call may take.
        on_step: called with (step, steps, what is recorded) for every step.

    Returns:
        What is recorded, of every step; those done in earlier calls included.

    Raises:
        TrainingError: if a value or the gradient's norm is not finite, naming the step; the last checkpoint stays.
        TimeUp: if the time of this call is over.
        OSError: if the disk does not take a checkpoint.
    """
    module, optimizer = task.module, task.optimizer
    recorded = restore(task.checkpoint, task.run, module, optimizer)
    unread: list[tuple[list[str], Tensor]] = []
    at_once = steps_at_once(next(module.parameters()))
    for step in range(len(recorded), task.steps):
        for group in optimizer.param_groups:
            group["lr"] = task.lr * learning_rate_factor(step, task.steps, task.warmup)
        optimizer.zero_grad()
        value, finite = backward(step)
        parallel.add_gradients(module.parameters())
        finite["the gradient's norm"] = nn.utils.clip_grad_norm_(module.parameters(), task.grad_clip)
        unread.append((list(finite), torch.stack([value.detach(), *(x.detach() for x in finite.values())])))
        read = len(unread) == at_once or step + 1 == task.steps
        if read:
            _read(task, unread, recorded, on_step)
        optimizer.step()
        if read and part.due():
            if parallel.leads():
                store(task.checkpoint, task.run, module, optimizer, recorded)
            part.kept(f"step {len(recorded)} of {task.steps} of {task.where}")
    return recorded


def steps_at_once(parameter: Tensor) -> int:
    """After how many steps losses are read: each one on a CPU, on a GPU so many that it never waits."""
    return _STEPS_AT_ONCE if parameter.is_cuda else 1


class Meter:
    """Passes progress on, and knows the speed of the steps of this call.

    Args:
        on_step: called with (step, steps, what is recorded).
        tokens: tokens of all steps.
        flops: FLOPs of all steps.
    """

    def __init__(self, on_step: Callable[[int, int, float], None], tokens: int, flops: float) -> None:
        self._on_step, self._tokens, self._flops = on_step, tokens, flops
        self._begun, self._share, self._seconds = time.monotonic(), 0.0, 0.0

    def __call__(self, step: int, steps: int, value: float) -> None:
        self._share += 1 / steps
        self._seconds = time.monotonic() - self._begun
        self._on_step(step, steps, value)

    @property
    def speed(self) -> dict[str, float]:
        """`tokens_per_second` and `flop_per_second`; empty if no step was left to take."""
        if not self._share:
            return {}
        of_all = self._share / max(self._seconds, 1e-9)
        return {"tokens_per_second": round(self._tokens * of_all, 1), "flop_per_second": round(self._flops * of_all)}


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at `step`: linear rise, then a cosine down to a tenth."""
    rise = max(int(total * warmup), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def _read(
    task: Descent,
    unread: list[tuple[list[str], Tensor]],
    recorded: list[float],
    on_step: Callable[[int, int, float], None],
) -> None:
    """Moves what the device has to say into `recorded`."""
    names = [of_step for of_step, _ in unread]
    rows: Iterable[list[float]] = torch.stack([values for _, values in unread]).tolist()
    unread.clear()
    for of_step, (value, *checked) in zip(names, rows, strict=True):
        step = len(recorded)
        for name, found in zip(of_step, checked, strict=True):
            if not math.isfinite(found):
                raise TrainingError(f"{name} is {found} at {task.where}, step {step} of {task.steps}: {task.advice}")
        recorded.append(value)
        on_step(step + 1, task.steps, value)
