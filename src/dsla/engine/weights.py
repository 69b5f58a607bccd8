"""The teacher's weights as the packed decoder wants them: q, k, v and gate, up fused, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsla.checkpoint import weight_files
from dsla.engine.layer import LayerNorm, LayerWeights, Mlp, Norm, RmsNorm
from dsla.engine.linears import Embedding, Linear, Projection, packed, rounded_to_int4
from dsla.errors import ModelError
from dsla.families import ACTIVATIONS, NORM_EPS, Family, attention_shape

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class DecoderWeights:
    """All weights; where head and embedding are the same, and kept in the same form, they are one object."""

    embed: Embedding
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Projection

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return _nbytes(self)

    @property
    def bytes_per_step(self) -> int:
        """Bytes a step reads at least: all but the embedding, of which it reads a row a token, unless it is the head too."""
        return _nbytes((self.layers, self.norm, self.head))


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model folder, each read when it is asked for.

    Args:
        path: folder with `model.safetensors`, or several files and `model.safetensors.index.json`.

    Raises:
        ModelError: if a file is missing, damaged, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for file in weight_files(path):
            opened: Any = safe_open(file, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def build_weights(
    tensors: Mapping[str, Tensor],
    config: Any,
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    int4: bool = False,
) -> DecoderWeights:
    """Builds a decoder's weights.

    Args:
        tensors: a checkpoint's tensors by their Hugging Face names.
        config: the model's Hugging Face config.
        family: its facts, by `family_of`.
        dtype: what to keep them in.
        device: where to keep them.
        int4: round the projections and the head to four bits; for bf16.

    Raises:
        ModelError: naming the first tensor that is missing, unused, no plain floating-point tensor, or of another shape
            than the config says.
    """
    kept = rounded_to_int4 if int4 else packed
    used: set[str] = set()
    shape = attention_shape(config)
    hidden, q_width, kv_width = config.hidden_size, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim

    def put(name: str, target: Tensor) -> None:
        if name not in tensors:
            raise ModelError(f"the checkpoint lacks tensor {name!r}")
        source = tensors[name]
        if source.dtype not in _DTYPES:
            raise ModelError(
                f"tensor {name!r} is {_short(source.dtype)}, expected {', '.join(map(_short, _DTYPES))}: quantised "
                "checkpoints are not supported, fetch the model's unquantised one"
            )
        if source.shape != target.shape:
            raise ModelError(f"tensor {name!r} has shape {list(source.shape)}, the config says {list(target.shape)}")
        target.copy_(source)
        used.add(name)

    def read(name: str, *size: int) -> Tensor:
        target = torch.empty(size, dtype=dtype, device=device)
        put(name, target)
        return target

    def norm(name: str, size: int) -> Norm:
        weight, eps = read(f"{name}.weight", size), float(getattr(config, NORM_EPS[family.norm_kind]))
        return (
            LayerNorm(weight, read(f"{name}.bias", size), eps) if family.norm_kind == "layer" else RmsNorm(weight, eps)
        )

    def linear(prefix: str, names: Sequence[str], widths: Sequence[int], n_in: int, biased: bool | str) -> Projection:
        """One projection out of `names`, each as wide as `widths` says, or one as wide as all of them."""
        weight = torch.empty(sum(widths), n_in, dtype=dtype, device=device)
        bias = torch.empty(len(weight), dtype=dtype, device=device) if biased else None
        start = 0
        for name, n_out in zip(names, widths if len(names) > 1 else [len(weight)], strict=True):
            put(f"{prefix}.{name}.weight", weight[start : start + n_out])
            if bias is not None:
                put(f"{prefix}.{name}.bias", bias[start : start + n_out])
            start += n_out
        return kept(Linear(weight, bias))

    def one_layer(name: str) -> LayerWeights:
        attention, inner = f"{name}.{family.attention}", config.intermediate_size
        return LayerWeights(
            attention_norm=norm(f"{name}.{family.attention_norm}", hidden),
            qkv=linear(attention, family.qkv, [q_width, kv_width, kv_width], hidden, family.qkv_bias),
            o=linear(attention, [family.o], [hidden], q_width, family.o_bias),
            mlp_norm=norm(f"{name}.{family.mlp_norm}", hidden) if family.mlp_norm else None,
            mlp=Mlp(
                up=linear(name, family.mlp_in, [inner] * (1 + family.gated), hidden, family.mlp_bias),
                down=linear(name, [family.mlp_out], [hidden], inner, family.mlp_bias),
                activation=ACTIVATIONS[config.hidden_act],
                gated=family.gated,
            ),
            q_norm=norm(f"{attention}.{family.q_norm}", shape.head_dim) if family.q_norm else None,
            k_norm=norm(f"{attention}.{family.k_norm}", shape.head_dim) if family.k_norm else None,
        )

    layers = tuple(one_layer(f"{family.layers}.{i}") for i in range(config.num_hidden_layers))
    table = read(f"{family.embed}.weight", config.vocab_size, hidden)
    embed = packed(Linear(table))
    separate = not config.tie_word_embeddings or f"{family.head}.weight" in tensors
    head = read(f"{family.head}.weight", config.vocab_size, hidden) if separate else table
    # As in transformers: a head that the checkpoint holds counts, even where the config ties it.
    tied = not separate or (config.tie_word_embeddings and torch.equal(head, table))
    bias = read(f"{family.head}.bias", config.vocab_size) if family.head_bias else None
    out = embed if tied and bias is None and not int4 else kept(Linear(table if tied else head, bias))
    weights = DecoderWeights(embed, layers, norm(family.norm, hidden), out)
    unused = sorted(name for name in tensors if name not in used and not name.endswith("rotary_emb.inv_freq"))
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ModelError(
            f"the checkpoint holds tensor {unused[0]!r}{more}, which a {family.name} model with this config does not "
            "have: take the model's own, unquantised checkpoint and config"
        )
    return weights


def _nbytes(part: object) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in _tensors(part)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(part: object) -> Iterator[Tensor]:
    """All tensors of nested data classes and tuples."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for member in part:
            yield from _tensors(member)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
