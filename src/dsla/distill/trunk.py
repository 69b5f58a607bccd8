"""A causal language model as conversion sees it: embedding, decoder layers one by one, norm and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsla.errors import ModelError
from dsla.families import family_of


class Trunk:
    """Runs any stretch of a model's layers, causal and without a mask.

    Args:
        model: a Hugging Face causal language model of a supported family, in evaluation mode.

    Attributes:
        layers: the decoder layers; converted ones run as their level says.
        head: the output head.
        device: where the model is.
        dtype: the model's.

    Raises:
        ModelError: if the family is unknown, or the model would not attend causally.
    """

    def __init__(self, model: Any) -> None:
        if model.config._attn_implementation != "sdpa":
            raise ModelError(
                f"the teacher must run attention as 'sdpa', which is causal without a mask, "
                f"found {model.config._attn_implementation!r}: call model.set_attn_implementation('sdpa')"
            )
        family = family_of(model.config)
        self.layers: nn.ModuleList = model.get_submodule(family.layers)
        self.head: nn.Linear = model.get_submodule(family.head)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._embed, self._norm = model.get_submodule(family.embed), model.get_submodule(family.norm)
        self._rotary = model.get_decoder().rotary_emb
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}

    def position(self, length: int) -> tuple[Tensor, Tensor]:
        """Cos and sin of the rotary embedding of positions 0 to `length` - 1, `[1, length, D]` in the model's dtype."""
        if length not in self._positions:
            positions = torch.arange(length, device=self.device).unsqueeze(0)
            self._positions[length] = self._rotary(torch.zeros(1, device=self.device, dtype=self.dtype), positions)
        return self._positions[length]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, T]` int64 as inputs `[B, T, hidden]` of layer 0."""
        embedded: Tensor = self._embed(tokens.to(self.device))
        return embedded

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Inputs `[B, T, hidden]` of layer `start` through to those of layer `stop` (default: behind the last)."""
        position = self.position(x.shape[1])
        for layer in self.layers[start:stop]:
            x = layer(x, position_embeddings=position, attention_mask=None)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """The last layer's output as the head's input `[B, T, hidden]`."""
        normed: Tensor = self._norm(x)
        return normed
