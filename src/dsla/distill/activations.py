"""Inputs of the layers for a fixed set of token windows, recomputed from the nearest ones that are still valid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsla.errors import ModelError
from dsla.families import family_of


class Activations:
    """The residual stream at the layers' inputs, in the model's dtype, so that storing it loses nothing.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        tokens: token ids `[n, T]` int64.
        batch: windows a forward pass.

    Raises:
        ModelError: if the family is unknown, or the model would not attend causally.
    """

    def __init__(self, model: Any, tokens: Tensor, batch: int) -> None:
        if model.config._attn_implementation != "sdpa":
            raise ModelError(
                f"the teacher must run attention as 'sdpa', which is causal without a mask, "
                f"found {model.config._attn_implementation!r}: call model.set_attn_implementation('sdpa')"
            )
        family = family_of(model.config)
        self.device = next(model.parameters()).device
        self._layers = model.get_submodule(family.layers)
        self._embed = model.get_submodule(family.embed)
        self._tokens, self._batch = tokens, batch
        self._at: dict[int, Tensor] = {}
        rotary = model.get_decoder().rotary_emb
        positions = torch.arange(tokens.shape[1], device=self.device).unsqueeze(0)
        dtype = next(model.parameters()).dtype
        self.position = rotary(torch.zeros(1, device=self.device, dtype=dtype), positions)

    @torch.no_grad()
    def at(self, layer: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """Inputs `[n, T, hidden]` of `layer`, on the CPU.

        Args:
            layer: layer index.
            on_progress: called with (windows done, windows in all).
        """
        start = max((i for i in self._at if i <= layer), default=None)
        if start == layer:
            return self._at[layer]
        pieces = []
        for begin in range(0, len(self._tokens), self._batch):
            rows = slice(begin, begin + self._batch)
            source = (
                self._embed(self._tokens[rows].to(self.device))
                if start is None
                else self._at[start][rows].to(self.device)
            )
            for i in range(start or 0, layer):
                source = self._layers[i](source, position_embeddings=self.position, attention_mask=None)
            pieces.append(source.cpu())
            on_progress(min(begin + self._batch, len(self._tokens)), len(self._tokens))
        self._at[layer] = torch.cat(pieces)
        return self._at[layer]

    def changed(self, layer: int, later: Sequence[int]) -> None:
        """Forgets what depends on the output of `layer`, and what none of the layers to come would start from.

        Args:
            layer: the layer that changed.
            later: layers whose inputs will be asked for.
        """
        valid = [i for i in self._at if i <= layer]
        starts = {max((i for i in valid if i <= wanted), default=None) for wanted in later}
        self._at = {i: self._at[i] for i in valid if i in starts}
