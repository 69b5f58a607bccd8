"""Inputs of the layers for a fixed set of batches, recomputed from the nearest ones that are still valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsla.distill.trunk import Trunk


class Activations:
    """The residual stream at the layers' inputs, in the model's dtype, so that storing it loses nothing.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        batches: token ids, each `[rows, length]` int64; a forward pass takes one.
        room: bytes of the inputs of one layer that may stay on the model's device; beyond them they are kept on the host.
            Default: an eighth of what is free there.

    Attributes:
        trunk: the model's layers; its `position` gives the rotary embedding of a batch's length.

    Raises:
        ModelError: if the family is unknown, or the model would not attend causally.
    """

    def __init__(self, model: Any, batches: Sequence[Tensor], room: int | None = None) -> None:
        self.trunk = Trunk(model)
        self._batches = batches
        self._at: dict[int, list[Tensor]] = {}
        device, hidden = self.trunk.device, model.config.hidden_size
        if device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[0] // 8 if room is None else room
            needed = sum(batch.numel() for batch in batches) * hidden * self.trunk.dtype.itemsize
            self._keep = _as_it_is if needed <= room else _pinned
        else:
            self._keep = _as_it_is

    @torch.no_grad()
    def at(self, layer: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Tensor]:
        """Inputs of `layer`, `[rows, length, hidden]` for each batch, on the model's device or pinned on the host.

        Args:
            layer: layer index.
            on_progress: called with (batches done, batches in all).
        """
        start = max((i for i in self._at if i <= layer), default=None)
        if start == layer:
            return self._at[layer]
        inputs = []
        for place, tokens in enumerate(self._batches):
            x = (
                self.trunk.embed(tokens)
                if start is None
                else self._at[start][place].to(self.trunk.device, non_blocking=True)
            )
            inputs.append(self._keep(self.trunk.run(x, start or 0, layer)))
            on_progress(place + 1, len(self._batches))
        self._at[layer] = inputs
        return inputs

    def changed(self, layer: int, later: Sequence[int]) -> None:
        """Forgets what depends on the output of `layer`, and what none of the layers to come would start from.

        Args:
            layer: the layer that changed.
            later: layers whose inputs will be asked for.
        """
        self._at = {i: self._at[i] for i in still_of_use(self._at, layer, later)}


def still_of_use(held: Iterable[int], layer: int, later: Sequence[int]) -> list[int]:
    """Those of the `held` layers whose inputs are still right once `layer` has changed, and needed for the `later` ones."""
    valid = [i for i in held if i <= layer]
    starts = {max((i for i in valid if i <= wanted), default=None) for wanted in later}
    return [i for i in valid if i in starts]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _pinned(x: Tensor) -> Tensor:
    # Later copies to the device queue up behind this one, so nothing waits for it.
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
