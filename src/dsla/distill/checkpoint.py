"""Training that was killed goes on from here: weights, optimiser moments and the losses so far, in one file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsla.errors import TrainingError
from dsla.storage import write_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


def store(path: Path, run: str, module: nn.Module, optimizer: torch.optim.AdamW, losses: list[float]) -> None:
    """Writes a checkpoint, atomically.

    Args:
        path: its place; the folder must exist.
        run: names the run; a checkpoint of another one is not restored.
        module: what is trained.
        optimizer: of its parameters.
        losses: one for each step done.

    Raises:
        OSError: if the disk does not take it; the earlier checkpoint stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        tensors[f"weight.{name}"] = p
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in _MOMENTS if p in optimizer.state}
        if p in optimizer.state:
            tensors[f"step.{name}"] = optimizer.state[p]["step"]
    write_tensors(path, tensors, {"run": run, "losses": json.dumps(losses)})


def restore(path: Path, run: str, module: nn.Module, optimizer: torch.optim.AdamW) -> list[float]:
    """Puts a checkpoint back.

    Args:
        path: where `store` wrote it.
        run: as given to `store`.
        module: takes the weights.
        optimizer: takes the moments.

    Returns:
        The losses of the steps done; none if there is no checkpoint of this run.

    Raises:
        TrainingError: if it is damaged.
    """
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["run"] != run:
                return []
            losses: list[float] = json.loads(metadata["losses"])
            held = set(file.keys())
            with torch.no_grad():
                for name, p in module.named_parameters():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                    if f"exp_avg.{name}" in held:
                        moments = {key: file.get_tensor(f"{key}.{name}").to(p.device) for key in _MOMENTS}
                        optimizer.state[p] = {"step": file.get_tensor(f"step.{name}"), **moments}
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"checkpoint {path} is damaged ({error}): remove it to train anew") from None
    return losses
