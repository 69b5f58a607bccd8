"""The teacher's weights as the packed decoder wants them: q, k, v and gate, up fused, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsla.checkpoint import weight_files
from dsla.errors import ModelError
from dsla.families import Family, attention_shape

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Linear:
    """Weight `[n_out, n_in]` and bias `[n_out]` (or None) of a projection."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms `[hidden]`, fused projections, and norms of query and key heads `[D]` (or None)."""

    attention_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights; `head` is `embed` itself where they are the same."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        tensors = {self.embed.data_ptr(): self.embed, self.norm.data_ptr(): self.norm, self.head.data_ptr(): self.head}
        for layer in self.layers:
            for part in (layer.qkv, layer.o, layer.gate_up, layer.down):
                tensors[part.weight.data_ptr()] = part.weight
                if part.bias is not None:
                    tensors[part.bias.data_ptr()] = part.bias
            norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            tensors |= {norm.data_ptr(): norm for norm in norms if norm is not None}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


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
    tensors: Mapping[str, Tensor], config: Any, family: Family, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> DecoderWeights:
    """Builds a decoder's weights.

    Args:
        tensors: a checkpoint's tensors by their Hugging Face names.
        config: the model's Hugging Face config.
        family: its facts.
        dtype: what to keep them in.
        device: where to keep them.

    Raises:
        ModelError: naming the first tensor that is missing, unused, no plain floating-point tensor, or of another shape
            than the config says.
    """
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

    def fuse(prefix: str, parts: Mapping[str, int], n_in: int, biased: bool | None) -> Linear:
        weight = torch.empty(sum(parts.values()), n_in, dtype=dtype, device=device)
        if biased is None:
            biased = any(f"{prefix}.{name}.bias" in tensors for name in parts)
        bias = torch.empty(weight.shape[0], dtype=dtype, device=device) if biased else None
        start = 0
        for name, n_out in parts.items():
            put(f"{prefix}.{name}.weight", weight[start : start + n_out])
            if bias is not None:
                put(f"{prefix}.{name}.bias", bias[start : start + n_out])
            start += n_out
        return Linear(weight, bias)

    attention_bias, mlp_bias = _says(config, "attention_bias"), _says(config, "mlp_bias")
    layers = []
    for i in range(config.num_hidden_layers):
        layer = f"{family.layers}.{i}"
        attention = f"{layer}.{family.attention}"
        layers.append(
            LayerWeights(
                attention_norm=read(f"{layer}.{family.attention_norm}.weight", hidden),
                qkv=fuse(
                    attention, {family.q: q_width, family.k: kv_width, family.v: kv_width}, hidden, attention_bias
                ),
                o=fuse(attention, {family.o: hidden}, q_width, attention_bias),
                mlp_norm=read(f"{layer}.{family.mlp_norm}.weight", hidden),
                gate_up=fuse(
                    layer,
                    {family.gate: config.intermediate_size, family.up: config.intermediate_size},
                    hidden,
                    mlp_bias,
                ),
                down=fuse(layer, {family.down: hidden}, config.intermediate_size, mlp_bias),
                q_norm=read(f"{attention}.{family.q_norm}.weight", shape.head_dim) if family.q_norm else None,
                k_norm=read(f"{attention}.{family.k_norm}.weight", shape.head_dim) if family.k_norm else None,
            )
        )
    embed = read(f"{family.embed}.weight", config.vocab_size, hidden)
    norm = read(f"{family.norm}.weight", hidden)
    head = embed
    if not config.tie_word_embeddings or f"{family.head}.weight" in tensors:
        head = read(f"{family.head}.weight", config.vocab_size, hidden)
        # As in transformers: a head that the checkpoint holds counts, even where the config ties it.
        if config.tie_word_embeddings and torch.equal(head, embed):
            head = embed
    unused = sorted(name for name in tensors if name not in used and not name.endswith("rotary_emb.inv_freq"))
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ModelError(
            f"the checkpoint holds tensor {unused[0]!r}{more}, which a {family.name} model with this config does not "
            "have: take the model's own, unquantised checkpoint and config"
        )
    return DecoderWeights(embed, tuple(layers), norm, head)


def _says(config: Any, name: str) -> bool | None:
    """A setting that this kind of config has; None where it has none, so that the checkpoint decides."""
    return bool(getattr(config, name)) if hasattr(type(config), name) else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
