"""The packed-token decoder: a family's forward pass over requests at any levels, without padding or Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsla.engine.arena import Arena
from dsla.engine.batch import PackedBatch, Split
from dsla.engine.layer import LayerWeights
from dsla.engine.linears import Int4Linear, packed_delta
from dsla.engine.weights import Checkpoint, DecoderWeights, build_weights
from dsla.errors import ModelError
from dsla.families import Family, attention_shape, context_length, family_of
from dsla.mixers import DslaMixer, SoftmaxMixer, StateSpec
from dsla.ops.linear import GROUP, LANES
from dsla.ops.shapes import state_dtype as computed_in

if TYPE_CHECKING:
    from dsla.convert import Adapter


def end_tokens(value: int | Sequence[int] | None) -> frozenset[int]:
    """End tokens of a config, which holds none, one, or several."""
    return frozenset(() if value is None else (value,) if isinstance(value, int) else value)


def generation_end_tokens(model: Path) -> frozenset[int]:
    """End tokens that a model folder's `generation_config.json` adds, if there is one.

    Raises:
        ModelError: if the file is damaged.
    """
    path = model / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}): fetch the model again, or remove the file") from None
    value = found.get("eos_token_id") if isinstance(found, dict) else found
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not isinstance(found, dict) or not all(type(token) is int for token in tokens):
        raise ModelError(
            f"{path} is damaged (expected an object whose eos_token_id is a token id, a list of them, or null): "
            "fetch the model again, or remove the file"
        )
    return frozenset(tokens)


def _checked_state_dtype(asked: torch.dtype | None, model: torch.dtype) -> torch.dtype:
    computed = computed_in(model)
    if asked not in (None, computed, *([model] if model is torch.bfloat16 else [])):
        name, states = (str(dtype).removeprefix("torch.") for dtype in (model, asked))
        raise ModelError(
            f"states in {states} do not go with a model in {name}: keep them in {str(computed).removeprefix('torch.')}, "
            "or serve the model in bfloat16, where they can be float32 or bfloat16"
        )
    return asked or computed


class PackedDecoder:
    """A model and all its levels. It keeps no request's memory: that lies in an arena made for it.

    Args:
        weights: the teacher's.
        config: the model's Hugging Face config.
        family: its facts, by `family_of`, which refuses configs that are not computed here.
        mixers: layer -> mixer of the layers that can be converted, least sensitive first. Default: none.
        state_dtype: what the mixers' states are kept in, fp32 or bfloat16. Default: fp32 (fp64 in an fp64 model).

    Raises:
        ModelError: if states are asked for in a dtype that does not go with the model's.

    Attributes:
        shape: sizes of the attention layers.
        n_layers: layers.
        order: layers that can be converted, least sensitive first.
        dtype: of weights and KV cache.
        state_dtype: of the states of converted layers.
        device: where it computes.
        max_tokens: tokens of prompt and output it was made for.
        vocab_size: width of the logits.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        config: Any,
        family: Family,
        mixers: Mapping[int, DslaMixer] | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self.weights = weights
        self.mixers = dict(mixers or {})
        self.order = tuple(self.mixers)
        self.shape = attention_shape(config)
        self.softmax = SoftmaxMixer(self.shape)
        self.n_layers = len(weights.layers)
        self.dtype, self.device = weights.norm.weight.dtype, weights.norm.weight.device
        self._deltas = {
            layer: (packed_delta(mixer.q_delta, self.dtype), packed_delta(mixer.o_delta, self.dtype))
            for layer, mixer in self.mixers.items()
        }
        self.state_dtype = _checked_state_dtype(state_dtype, self.dtype)
        self.max_tokens, self.vocab_size = context_length(config), config.vocab_size
        self.eos_token_ids = end_tokens(config.eos_token_id)
        inv_freq, scale = family.rope(config)
        angles = torch.arange(self.max_tokens, dtype=torch.float32).unsqueeze(1) * inv_freq.cpu().unsqueeze(0)
        self._cos = (angles.cos() * scale).to(self.device, self.dtype)
        self._sin = (angles.sin() * scale).to(self.device, self.dtype)

    @classmethod
    def load(
        cls,
        model: Path,
        adapter: Adapter | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        int4: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> PackedDecoder:
        """Reads a model folder.

        Args:
            model: folder with `config.json` and safetensors.
            adapter: its adapter, for levels above 0.
            dtype: of the weights. Default: the config's.
            device: where they go.
            int4: round the projections and the head to four bits, in groups of 32 inputs; the rest is bf16.
            state_dtype: what the states of converted layers are kept in. Default: fp32 (fp64 in an fp64 model).

        Raises:
            ModelError: if int4 or bf16 states are asked for beside another dtype than bf16, the folder is no model of a
                supported family, or a tensor is missing or misshapen.
        """
        from dsla.convert import read_config  # imports transformers, which a built decoder does without

        config = read_config(model)
        family = family_of(config)
        dtype = dtype or config.dtype or torch.float32
        if int4 and dtype is not torch.bfloat16:
            raise ModelError(f"int4 weights go with bf16 for the rest, found {dtype}: ask for bf16")
        weights = build_weights(Checkpoint(model), config, family, dtype, device, int4)
        decoder = cls(weights, config, family, adapter.mixers if adapter else None, state_dtype)
        if int4 and not decoder.int4:
            raise ModelError(
                f"int4 weights need projections of multiples of {LANES} outputs and {GROUP} inputs: serve {model.name} in bf16"
            )
        decoder.eos_token_ids |= generation_end_tokens(model)
        return decoder

    @property
    def int4(self) -> bool:
        """Whether its projections are kept in four bits."""
        return isinstance(self.weights.layers[0].qkv, Int4Linear)

    @property
    def kv_spec(self) -> StateSpec:
        """Memory of a kept layer."""
        return self.softmax.state_spec(self.dtype)

    @property
    def slot_spec(self) -> StateSpec | None:
        """Memory of a converted layer; None if no layer can be converted."""
        return self.mixers[self.order[0]].state_spec(self.dtype, self.state_dtype) if self.order else None

    @property
    def slot_bytes_moved(self) -> int:
        """Bytes of a converted layer's memory that a token of a request moves: all are read, and states written as well."""
        slot = self.slot_spec
        return slot.fixed_bytes + slot.fixed["states"].nbytes if slot else 0

    @property
    def foldable(self) -> bool:
        """Whether layers of running requests can be converted."""
        return all(mixer.config.foldable for mixer in self.mixers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of weights and adapter in memory."""
        return self.weights.nbytes + self.adapter_nbytes

    @property
    def adapter_nbytes(self) -> int:
        """Bytes of what all levels together add to the weights."""
        return sum(p.numel() * p.element_size() for mixer in self.mixers.values() for p in mixer.parameters())

    def arena(self, budget_bytes: int, page_tokens: int = 16, poison: bool = False) -> Arena:
        """An arena for this model's requests.

        Args:
            budget_bytes: bytes of all requests' memory together, at most.
            page_tokens: tokens a KV page holds.
            poison: fill freed memory with NaN. For tests.
        """
        return Arena(
            budget_bytes, self.kv_spec, self.slot_spec, page_tokens=page_tokens, device=self.device, poison=poison
        )

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, arena: Arena) -> Tensor:
        """Computes the new tokens of a batch and adds them to the requests' memory.

        Args:
            batch: the tokens; the memory of each segment has room for them.
            arena: where the memory lies.

        Returns:
            Logits `[n_samples, vocab]` of `batch.sample_rows`, in the model's dtype.
        """
        hidden = self.weights.embed.rows(batch.tokens)
        cos, sin = (torch.cat([table, table], -1) for table in (self._cos[batch.positions], self._sin[batch.positions]))
        for layer, weights in enumerate(self.weights.layers):
            hidden, x = self._add_attention(layer, weights, hidden, cos, sin, batch, arena)
            hidden = weights.add_mlp(hidden, x)
        return self.weights.head(self.weights.norm(hidden[batch.sample_rows]))

    def _add_attention(
        self,
        layer: int,
        weights: LayerWeights,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: PackedBatch,
        arena: Arena,
    ) -> tuple[Tensor, Tensor]:
        """`hidden` `[T, width]` and what attention adds to it; and what attention has read."""
        split = batch.split(layer)
        rows, converted = split.converted_rows, split.any_converted
        q_delta, o_delta = self._deltas[layer] if converted else (None, None)
        plain = converted and not self.mixers[layer].config.rope
        inputs = weights.project(hidden, cos, sin, self.shape, q_delta, rows, plain)
        x, q, k, v = inputs.x, inputs.q, inputs.k, inputs.v
        parts = self._attend(layer, q, k, v, split, arena)
        if converted:
            if plain and inputs.plain:
                q, k = inputs.plain
            # In packing order: what is converted lies between decodes and chunks that are not.
            place = bool(split.kept_decodes)
            parts[place:place] = self._mix(layer, x, q, k, v, split, arena)
        y = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
        return weights.add_attended(hidden, y, o_delta, rows), x

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, split: Split, arena: Arena) -> list[Tensor]:
        """Softmax attention of the segments that keep this layer: `[n, H, D]` of all decodes, and of each chunk."""
        parts = []
        if split.kept_decodes:
            rows = split.kept_rows
            tables = [segment.memory.table(layer) for segment in split.kept_decodes]
            parts.append(self.softmax.step(q[rows], k[rows], v[rows], arena.pages, tables, split.kept_lengths))
        for segment, rows in split.kept_chunks:
            table = segment.memory.table(layer)
            parts.append(self.softmax.prefill(q[rows], k[rows], v[rows], arena.pages, table, segment.n_prior))
        return parts

    def _mix(self, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, split: Split, arena: Arena) -> list[Tensor]:
        """The converted layer's mixer on the segments that have it converted: as `_attend`."""
        mixer, parts = self.mixers[layer], []
        if split.decodes:
            rows = split.decode_rows
            slots = torch.tensor([segment.memory.slot(layer) for segment in split.decodes], device=self.device)
            parts.append(mixer.step(x[rows], q[rows], k[rows], v[rows], arena.slots, slots, split.decode_lengths))
        for segment, rows in split.chunks:
            slot = segment.memory.slot(layer)
            parts.append(mixer.extend(x[rows], q[rows], k[rows], v[rows], arena.slots, slot, segment.n_prior))
        return parts
