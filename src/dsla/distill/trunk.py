"""A causal language model as conversion sees it: embedding, decoder layers one by one, norm and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsla.errors import ModelError
from dsla.families import context_length, family_of


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
        positions = torch.arange(context_length(model.config), device=self.device).unsqueeze(0)
        rotary = model.get_decoder().rotary_emb
        self._tables: tuple[Tensor, Tensor] = rotary(torch.zeros(1, device=self.device, dtype=self.dtype), positions)

    def position(self, length: int, shift: int = 0) -> tuple[Tensor, Tensor]:
        """Cos and sin of the rotary embedding of `length` positions from `shift` on, `[1, length, R]` in the model's dtype."""
        cos, sin = self._tables
        return cos[:, shift : shift + length], sin[:, shift : shift + length]

    def draw_shift(self, length: int, generator: torch.Generator) -> int:
        """A position for rows of `length` tokens to begin at, anywhere in the context, earlier ones more often.

        Softmax attention reads distances alone, so the teacher is the same at every shift. Features, gates and mixing
        weights read rotated queries and keys, and know only the angles they were trained on.
        """
        share = float(torch.rand(1, generator=generator)) ** 2
        return int(share * (self._tables[0].shape[1] - length + 1))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, T]` int64 as inputs `[B, T, hidden]` of layer 0."""
        embedded: Tensor = self._embed(tokens.to(self.device))
        return embedded

    def run(self, x: Tensor, start: int = 0, stop: int | None = None, shift: int = 0) -> Tensor:
        """Inputs `[B, T, hidden]` of layer `start` through to those of layer `stop` (default: behind the last).

        The first token is at position `shift`.
        """
        position = self.position(x.shape[1], shift)
        for layer in self.layers[start:stop]:
            x = layer(x, position_embeddings=position, attention_mask=None)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """The last layer's output as the head's input `[B, T, hidden]`."""
        normed: Tensor = self._norm(x)
        return normed
