"""Training all converted layers together, at the highest level and one drawn anew each step, against the teacher's logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dsla.convert.surgery import Levels
from dsla.distill import parallel
from dsla.distill.checkpoint import store
from dsla.distill.descent import Descent, Values, descend
from dsla.distill.logits import divergence, teacher_kl
from dsla.distill.part import Part
from dsla.distill.recipe import StageSettings
from dsla.distill.trunk import Trunk

_BETAS = (0.9, 0.95)


def train_levels(
    trunk: Trunk,
    levels: Levels,
    batches: Sequence[Tensor],
    settings: StageSettings,
    seed: int,
    checkpoint: Path,
    part: Part,
    on_step: Callable[[int, int, float], None],
    write_text: Callable[[Tensor, int, int], Tensor] | None = None,
) -> list[float]:
    """Trains every mixer of `levels` in place, so that one set of weights serves all levels.

    Each step runs half of its rows at the highest level and the other half at a level drawn from those below, so that a
    layer learns to stand in for attention whichever of the others are converted. Everything a step does follows from the
    seed and its number: a run resumed from `checkpoint` ends in the same weights.

    Args:
        trunk: the model.
        levels: its levels; mixers hold fp32 weights and require gradients.
        batches: token ids `[rows, T]` int64, one batch a step.
        settings: optimisation.
        seed: of the levels drawn and the order of the batches.
        checkpoint: where weights and optimiser state are kept meanwhile; one of another run is not used.
        part: how long this call may take.
        on_step: called with (step, steps, KL at the highest level) for every step.
        write_text: (rows, level, seed) -> the same rows with their second half written by the model at that level; used for
            the share `settings.on_policy` of the steps.

    Returns:
        KL to the teacher at the highest level in nats a token, of each step.

    Raises:
        TrainingError: if loss or gradient is not finite, naming the step; the last checkpoint stays.
        TimeUp: if the time of this call is over.
    """
    mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in levels.mixers.items()})
    optimizer = torch.optim.AdamW(mixers.parameters(), settings.lr, betas=_BETAS, weight_decay=0.0)
    shapes = [list(batch.shape) for batch in batches]
    run = json.dumps([asdict(settings), seed, levels.plan.order, shapes, parallel.processes()])
    total, highest = len(batches), len(levels.mixers)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()

    def backward(step: int) -> Values:
        dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
        drawn = int(torch.randint(1, max(highest, 2), (1,), generator=dice))
        batch = batches[order[step]]
        tokens = parallel.own(batch, 2)
        if write_text is not None and float(torch.rand(1, generator=dice)) < settings.on_policy:
            tokens = write_text(tokens, highest, seed * 1_000_003 + step)
        tokens = tokens.to(trunk.device, non_blocking=True)
        shift = trunk.draw_shift(tokens.shape[1], dice)
        halves = (tokens[0::2], tokens[1::2]) if len(batch) > 1 else (tokens, tokens)
        rows = ((len(batch) + 1) // 2, max(len(batch) // 2, 1))
        loss, other = (
            level_backward(trunk, levels, half, level, len(half) / of_all, shift)
            for half, level, of_all in zip(halves, (highest, drawn), rows, strict=True)
        )
        return loss, {f"the loss at level {highest}": loss, f"the loss at level {drawn}": other}

    descent = Descent(
        mixers, optimizer, total, settings.lr, settings.warmup, settings.grad_clip, checkpoint, run,
        f"stage {settings.name}", "lower the stage's lr; the chain's weights are intact",
    )  # fmt: skip
    losses = descend(descent, backward, part, on_step)
    if parallel.leads():
        store(checkpoint, run, mixers, optimizer, losses)
    return losses


def level_backward(trunk: Trunk, levels: Levels, tokens: Tensor, level: int, share: float, shift: int = 0) -> Tensor:
    """Adds the gradients of the KL at one level; what lies before the first converted layer is run once for both models.

    Args:
        trunk: the model.
        levels: its levels.
        tokens: this process's rows `[rows, T]`.
        level: the level.
        share: what part they are of the rows of all processes.
        shift: position of the first token.

    Returns:
        The KL over the rows of all processes.
    """
    first = min(levels.plan.layers(level))
    levels.set(0)
    with torch.no_grad():
        shared = trunk.run(trunk.embed(tokens), 0, first, shift)
        teacher = trunk.norm(trunk.run(shared, first, None, shift))
    levels.set(level)
    student = trunk.norm(trunk.run(shared, first, None, shift))
    kl = parallel.total(share * teacher_kl(student, teacher, trunk.head))
    kl.backward()
    return kl.detach()


@torch.no_grad()
def held_out(
    trunk: Trunk,
    levels: Levels,
    batches: Sequence[Tensor],
    checked: Sequence[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, float]]:
    """Perplexity of held-out text and KL to the teacher in nats a token, at each of some levels.

    Args:
        trunk: the model.
        levels: its levels.
        batches: token ids `[rows, T]` int64.
        checked: the levels; level 0 is always among the results.
        on_progress: called with (batches done, batches in all).

    Returns:
        Level -> `perplexity`, `kl`.
    """
    sums = {level: torch.zeros(2, dtype=torch.float64) for level in sorted({0, *checked})}
    count = 0
    for done, batch in enumerate(batches, 1):
        count += batch[:, 1:].numel()
        embedded = trunk.embed(batch)
        levels.set(0)
        teacher = trunk.norm(trunk.run(embedded))[:, :-1]
        targets = batch[:, 1:].to(trunk.device)
        for level, total in sums.items():
            levels.set(level)
            student = trunk.norm(trunk.run(embedded))[:, :-1] if level else teacher
            total += torch.stack(divergence(student, teacher, targets, trunk.head)).double().cpu()
        on_progress(done, len(batches))
    levels.set(0)
    return {
        level: {"perplexity": math.exp(total[1] / count), "kl": float(total[0] / count)}
        for level, total in sums.items()
    }


def checked_levels(highest: int, count: int) -> tuple[int, ...]:
    """`count` levels spread evenly up to the highest, which is one of them."""
    return tuple(sorted({max(round(highest * (i + 1) / count), 1) for i in range(count)}))


def worse_level(
    before: dict[int, dict[str, float]], after: dict[int, dict[str, float]], tolerance: float
) -> int | None:
    """The level whose perplexity grew most, if it grew by more than the share `tolerance`; else None."""
    growth = {level: after[level]["perplexity"] / before[level]["perplexity"] - 1 for level in before}
    worst = max(growth, key=growth.__getitem__)
    return worst if growth[worst] > tolerance else None
