"""The Hugging Face face of a converted model: attention modules swapped in place, projections shared with the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from dsla.convert.plan import Plan
from dsla.errors import ModelError
from dsla.families import Family, family_of
from dsla.mixers import DslaMixer, Memory
from dsla.ops import rotate


class DslaCacheLayer(DynamicLayer):
    """Cache of one layer of a batch: keys and values until the layer is converted, a mixer's fixed memory from then on.

    It counts its own tokens, so a model with every layer converted still knows its length.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | None = None
        self.length = 0

    @classmethod
    def taking_over(cls, layer: DynamicLayer, mixer: DslaMixer) -> DslaCacheLayer:
        """A converted layer's cache that continues `layer`, whose keys and values are folded into the states."""
        new = cls()
        if layer.get_seq_length():
            rows = zip(layer.keys.transpose(1, 2), layer.values.transpose(1, 2), strict=True)  # type: ignore[union-attr]
            folded = [mixer.fold(k, v) for k, v in rows]
            new.memory = {name: torch.cat([row[name] for row in folded]) for name in folded[0]}
            new.length = layer.get_seq_length()
            new.is_initialized = True
        return new

    def get_seq_length(self) -> int:
        return self.length

    def advance(self, memory: Memory, tokens: int) -> None:
        """Keeps what `tokens` more tokens left."""
        self.memory, self.length, self.is_initialized = memory, self.length + tokens, True

    def reset(self) -> None:
        self.memory, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ModelError("a converted layer cannot take tokens back: its states have no memory of single tokens")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ModelError(
            "a converted layer cannot become attention again within a request: start a new cache at the lower level"
        )

    def _map(self, change: Any) -> None:
        if self.memory is not None:
            self.memory = {name: change(tensor) for name, tensor in self.memory.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])


class ConvertedAttention(nn.Module):
    """Stands where the teacher's attention stood; projections and head norms are the teacher's own modules.

    Args:
        base: the teacher's attention module.
        mixer: what mixes tokens in its place.
        family: names of the projections.
    """

    def __init__(self, base: nn.Module, mixer: DslaMixer, family: Family) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx: int = base.layer_idx  # type: ignore[assignment]
        self.names = (*family.qkv, family.o)
        self.norms = (family.q_norm, family.k_norm)
        for name in (*self.names, *filter(None, self.norms)):
            setattr(self, name, getattr(base, name))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the teacher's attention: `[B, T, hidden]` in and out; the mask is causal by construction and not read.

        The cache comes as `cache` from transformers 5.24 on, and as `past_key_values` before.
        """
        q, k, v = project(self, hidden_states, position_embeddings)
        cache = past_key_values if cache is None else cache
        cached = None if cache is None else self._cache_layer(cache)
        memory = cached.memory if cached else None
        lengths = torch.full((len(q),), cached.length if cached else 0, device=q.device)
        y, memory = self.mixer.prefill(hidden_states, q, k, v, memory, lengths)
        if cached is not None:
            cached.advance(memory, q.shape[1])
        return self.output(y), None

    def output(self, y: Tensor) -> Tensor:
        """Heads `[B, T, H, D]` through the output projection and its delta."""
        y = y.flatten(2)
        projected: Tensor = getattr(self, self.names[-1])(y) + self.mixer.o_delta(y)
        return projected

    def _cache_layer(self, cache: Cache) -> DslaCacheLayer:
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[self.layer_idx]
        if isinstance(layer, DslaCacheLayer):
            return layer
        if type(layer) is not DynamicLayer:
            raise ModelError(
                f"converted layers need a DynamicCache, found a {type(layer).__name__} for layer {self.layer_idx}"
            )
        cache.layers[self.layer_idx] = converted = DslaCacheLayer.taking_over(layer, self.mixer)
        return converted


def project(attention: ConvertedAttention, x: Tensor, position: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, T, H, D]` with their delta, keys and values `[B, T, G, D]` of a converted layer."""
    mixer, shape = attention.mixer, attention.mixer.shape
    parts = [getattr(attention, name)(x) for name in attention.names[:-1]]
    if len(parts) == 1:
        q_width, kv_width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        parts = parts[0].split([q_width, kv_width, kv_width], -1)
    q, k, v = (y.unflatten(-1, (-1, shape.head_dim)) for y in (parts[0] + mixer.q_delta(x), *parts[1:]))
    q, k = (getattr(attention, name)(y) if name else y for name, y in zip(attention.norms, (q, k), strict=True))
    if mixer.config.rope:
        cos, sin = (y.to(q.dtype) for y in position)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


class Levels:
    """The levels of one loaded Hugging Face model; level k is active after `set(k)`.

    Args:
        model: a causal language model of a supported family; changed in place.
        plan: order of the layers.
        mixers: layer -> mixer; every layer of the plan's order that can be reached.

    Attributes:
        level: the active level.
        mixers: as given.
    """

    def __init__(self, model: nn.Module, plan: Plan, mixers: dict[int, DslaMixer]) -> None:
        self.plan, self.mixers, self.level = plan, mixers, 0
        family = family_of(model.config)
        self._layers = model.get_submodule(family.layers)
        self._name = family.attention
        self._softmax = {i: getattr(self._layers[i], family.attention) for i in mixers}  # type: ignore[index]
        self._dsla = {i: ConvertedAttention(self._softmax[i], mixer, family) for i, mixer in mixers.items()}
        model.get_decoder().register_forward_pre_hook(self._check_call, with_kwargs=True)  # type: ignore[operator]
        model.register_state_dict_post_hook(_teacher_only)

    def set(self, level: int) -> None:
        """Makes `level` the active one. A running generation whose cache holds keys and values goes on: they are folded.

        Raises:
            PlanError: if the plan has no such level.
            ModelError: if the adapter holds too few layers for it.
        """
        converted = self.plan.layers(level)
        missing = [layer for layer in converted if layer not in self._dsla]
        if missing:
            raise ModelError(f"level {level} needs layer {missing[0]}, which this adapter does not hold")
        for i, softmax in self._softmax.items():
            setattr(self._layers[i], self._name, self._dsla[i] if i in converted else softmax)  # type: ignore[index]
        self.level = level

    def _check_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.level:
            return
        device, own = next(module.parameters()).device, next(self.mixers[self.plan.order[0]].parameters()).device
        if device != own:
            raise ModelError(f"the model is on {device}, its adapter on {own}: give the device to dsla.load instead")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and (mask.dim() != 2 or not mask.bool().all()):
            raise ModelError(
                "padded batches and masks of one's own cannot pass through converted layers: generate prompts of one "
                "length together, or use the engine, which packs requests without padding"
            )


def _teacher_only(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keeps mixers out of the model's state: saved at any level, it is the teacher; mixers are saved as an adapter."""
    for name in [name for name in state if ".mixer." in name]:
        del state[name]
