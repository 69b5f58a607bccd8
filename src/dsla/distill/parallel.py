"""Several processes that train one adapter, each on its rows of every batch; all of it does nothing in a single process.

The frozen teacher's layers are sharded over the processes (FSDP2). Mixers are small: every process holds all of them, and
their gradients are added up. Losses are sums over the rows of all processes, so that the result is that of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsla.errors import ConfigError
from dsla.families import family_of

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)


def join(device: str) -> str:
    """Joins the processes that `torchrun` started, if it did.

    Args:
        device: `cpu`, or `cuda` for one GPU a process.

    Returns:
        The device of this process.

    Raises:
        ConfigError: if the device is a certain one, which all processes would use.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} cannot be used by several processes: give 'cuda', one GPU each, or 'cpu'")
    if not dist.is_initialized():
        # Decisions are made on the CPU, so that they never wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def leads() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def wait() -> None:
    """Waits for all processes."""
    if processes() > 1:
        agreed(True)


def leader_first(read: Callable[[], T]) -> T:
    """What `read` answers: to the process that leads first, which may put files in order, then to the others."""
    if leads():
        try:
            return read()
        finally:
            wait()
    wait()
    return read()


def agreed(answer: bool) -> bool:
    """The answer of the process that leads, which all of them must act on alike."""
    if processes() == 1:
        return answer
    flag = torch.tensor(int(answer))
    dist.broadcast(flag, 0)
    return bool(flag)


def own(batch: Tensor, together: int = 1) -> Tensor:
    """This process's rows of a batch `[rows, ...]`; runs of `together` rows are not torn apart."""
    if processes() == 1:
        return batch
    return batch[[row for row in range(len(batch)) if row // together % processes() == rank()]]


def total(x: Tensor) -> Tensor:
    """The sum over all processes; its gradient is that of this process's own part, to be added up by `add_gradients`."""
    if processes() == 1:
        return x
    summed = x.detach().clone()
    dist.all_reduce(summed)
    return x + (summed - x.detach())


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by its sum over all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if processes() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def shard(model: Any) -> None:
    """Shares the weights of the decoder layers out among all processes; embedding, last norm and head stay whole.

    Args:
        model: a Hugging Face causal language model without mixers.
    """
    if processes() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (processes(),))
    for layer in model.get_submodule(family_of(model.config).layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Holds the whole weights of a layer whose parts are called one by one, not through its `forward`."""
    if processes() == 1:
        yield
        return
    layer.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        layer.reshard()  # type: ignore[operator]


def check_rows(part: str, batch_tokens: int, seq_len: int, together: int = 1) -> None:
    """Checks that the batches of a recipe have rows for every process.

    Args:
        part: part of the recipe, for the message.
        batch_tokens: tokens a batch.
        seq_len: tokens of its longest rows.
        together: rows that must go to one process.

    Raises:
        ConfigError: if they have too few.
    """
    if processes() > 1 and batch_tokens // seq_len < together * processes():
        raise ConfigError(
            f"recipe.{part}.batch_tokens is {batch_tokens}, {batch_tokens // seq_len} rows of {seq_len}: {processes()} "
            f"processes need at least {together * processes()} rows, so {together * processes() * seq_len} tokens"
        )
