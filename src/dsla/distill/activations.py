"""Inputs of the layers for a fixed set of batches, recomputed from the nearest ones that are still valid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsla.distill.trunk import Trunk


class Activations:
    """The residual stream at the layers' inputs, in the model's dtype, so that storing it loses nothing.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        batches: token ids, each `[rows, length]` int64; a forward pass takes one.

    Attributes:
        trunk: the model's layers; its `position` gives the rotary embedding of a batch's length.

    Raises:
        ModelError: if the family is unknown, or the model would not attend causally.
    """

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        self.trunk = Trunk(model)
        self._batches = batches
        self._at: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def at(self, layer: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Tensor]:
        """Inputs of `layer` on the CPU, `[rows, length, hidden]` for each batch.

        Args:
            layer: layer index.
            on_progress: called with (batches done, batches in all).
        """
        start = max((i for i in self._at if i <= layer), default=None)
        if start == layer:
            return self._at[layer]
        inputs = []
        for place, tokens in enumerate(self._batches):
            x = self.trunk.embed(tokens) if start is None else self._at[start][place].to(self.trunk.device)
            inputs.append(self.trunk.run(x, start or 0, layer).cpu())
            on_progress(place + 1, len(self._batches))
        self._at[layer] = inputs
        return inputs

    def changed(self, layer: int, later: Sequence[int]) -> None:
        """Forgets what depends on the output of `layer`, and what none of the layers to come would start from.

        Args:
            layer: the layer that changed.
            later: layers whose inputs will be asked for.
        """
        valid = [i for i in self._at if i <= layer]
        starts = {max((i for i in valid if i <= wanted), default=None) for wanted in later}
        self._at = {i: self._at[i] for i in valid if i in starts}
