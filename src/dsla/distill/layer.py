"""Training one layer, in steps that can be killed and resumed with the same result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsla.convert.surgery import ConvertedAttention
from dsla.distill.objective import layer_loss, relative_error, teacher_output
from dsla.distill.recipe import TrainSettings
from dsla.errors import TrainingError
from dsla.storage import write_tensors


@dataclass
class LayerTask:
    """One layer to train.

    Attributes:
        index: layer index.
        attention: the converted attention; its mixer is what is trained.
        teacher: the softmax attention it replaces.
        norm: the norm before it.
        inputs: the layer's inputs `[n, T, hidden]`.
        valid: inputs never trained on.
        position: cos and sin of the rotary embedding.
    """

    index: int
    attention: ConvertedAttention
    teacher: nn.Module
    norm: nn.Module
    inputs: Tensor
    valid: Tensor
    position: tuple[Tensor, Tensor]


def train_layer(
    task: LayerTask,
    settings: TrainSettings,
    seed: int,
    checkpoint: Path,
    checkpoint_seconds: float,
    on_step: Callable[[int, int, float], None],
) -> list[float]:
    """Trains the mixer of `task` in place.

    Everything a step does follows from the seed and its number, so a run resumed from `checkpoint` ends in the same weights.

    Args:
        task: the layer.
        settings: optimisation.
        seed: of the data order.
        checkpoint: where weights and optimiser state are kept meanwhile; one of another layer, seed or settings is not used.
        checkpoint_seconds: seconds between checkpoints.
        on_step: called with (step, steps, loss) after every step.

    Returns:
        Relative squared error of each step.

    Raises:
        TrainingError: if loss or gradient is not finite, naming layer and step; the last checkpoint stays.
    """
    mixer, device = task.attention.mixer, task.position[0].device
    windows, seq_len = task.inputs.shape[:2]
    batch = max(settings.batch_tokens // seq_len, 1)
    per_epoch = math.ceil(windows / batch)
    total = settings.epochs * per_epoch
    optimizer = torch.optim.AdamW(mixer.parameters(), settings.lr, weight_decay=settings.weight_decay)
    run = json.dumps([task.index, asdict(settings), seed, windows, seq_len])
    done, errors = _restore(checkpoint, run, mixer, optimizer)
    saved = time.monotonic()
    for step in range(done, total):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows = order[place * batch : (place + 1) * batch]
        x = task.norm(task.inputs[rows].to(device))
        target = teacher_output(task.teacher, x, task.position)
        loss, error = layer_loss(task.attention, x, target, task.position, settings.gate_contrast)
        if not loss.isfinite():
            raise TrainingError(_not_finite("the loss", loss, task.index, step, total))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate_factor(step, total, settings.warmup)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(mixer.parameters(), settings.grad_clip)
        if not norm.isfinite():
            raise TrainingError(_not_finite("the gradient's norm", norm, task.index, step, total))
        optimizer.step()
        errors.append(error.item())
        on_step(step + 1, total, errors[-1])
        if time.monotonic() - saved > checkpoint_seconds:
            _store(checkpoint, run, mixer, optimizer, errors)
            saved = time.monotonic()
    return errors


@torch.no_grad()
def valid_errors(task: LayerTask) -> dict[str, float]:
    """Relative squared error on text never trained on: of the layer, and with its states off (window and sinks only)."""
    mixer, found = task.attention.mixer, {}
    for name, off in (("error", False), ("error_states_off", True)):
        mixer.states_off = off
        errors = []
        for row in task.valid:
            x = task.norm(row.unsqueeze(0).to(task.position[0].device))
            y = task.attention(x, task.position)[0]
            errors.append(float(relative_error(y, teacher_output(task.teacher, x, task.position))))
        found[name] = sum(errors) / len(errors)
    mixer.states_off = False
    return found


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at `step`: linear rise, then a cosine down to a tenth."""
    rise = max(int(total * warmup), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def _not_finite(what: str, value: Tensor, layer: int, step: int, total: int) -> str:
    return (
        f"{what} is {value.item()} at layer {layer}, step {step} of {total}: lower train.lr; finished layers are intact"
    )


def _store(path: Path, run: str, mixer: nn.Module, optimizer: torch.optim.AdamW, errors: list[float]) -> None:
    tensors: dict[str, Tensor] = {f"weight.{name}": p for name, p in mixer.named_parameters()}
    for name, p in mixer.named_parameters():
        tensors |= {
            f"{key}.{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") if p in optimizer.state
        }
    write_tensors(path, tensors, {"run": run, "errors": json.dumps(errors)})


def _restore(path: Path, run: str, mixer: nn.Module, optimizer: torch.optim.AdamW) -> tuple[int, list[float]]:
    if not path.exists():
        return 0, []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["run"] != run:
                return 0, []
            errors: list[float] = json.loads(metadata["errors"])
            with torch.no_grad():
                for name, p in mixer.named_parameters():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                    if f"exp_avg.{name}" in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                        moments = {
                            key: file.get_tensor(f"{key}.{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")
                        }
                        optimizer.state[p] = {"step": torch.tensor(float(len(errors))), **moments}
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"checkpoint {path} is damaged ({error}): remove it to train its layer anew") from None
    return len(errors), errors
