"""A full check of an adapter against its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dsla.convert.adapter import layer_file, load_adapter
from dsla.convert.load import read_config
from dsla.errors import AdapterError
from dsla.families import attention_shape
from dsla.hub import model_hash


def check_adapter(directory: Path, model: Path, dtype: torch.dtype) -> Iterator[str]:
    """Checks hashes, shapes, that every value is finite, and that every layer's live run and fold agree.

    Args:
        directory: the adapter.
        model: folder of its teacher.
        dtype: what the layers are run in.

    Yields:
        A line for each thing found good.

    Raises:
        AdapterError: naming the first thing wrong.
    """
    config = read_config(model)
    shape = attention_shape(config)
    adapter = load_adapter(directory, shape, model_hash(model), dtype)
    plan = adapter.plan
    yield f"teacher  {plan.teacher.name}, weights {plan.teacher.sha256[:12]}: match"
    yield f"layers   {adapter.max_level} of {plan.max_level} in the plan: hashes and shapes match"
    generator = torch.Generator().manual_seed(0)
    tokens = plan.mixer.window + plan.mixer.sinks + 70
    x = torch.randn(1, tokens, shape.hidden_size, generator=generator).to(dtype)
    q = torch.randn(1, tokens, shape.n_heads, shape.head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, tokens, shape.n_kv_heads, shape.head_dim, generator=generator).to(dtype)
    worst = 0.0
    for layer, mixer in adapter.mixers.items():
        for name, parameter in mixer.named_parameters():
            if not parameter.isfinite().all():
                raise AdapterError(f"{directory / layer_file(layer)}: tensor {name!r} holds a value that is not finite")
        y, memory = mixer.prefill(x, q, k, v)
        if not y.isfinite().all():
            raise AdapterError(f"layer {layer}: its output is not finite on ordinary input")
        if plan.mixer.foldable:
            expected = memory["states"]
            error = float((mixer.fold(k[0], v[0])["states"] - expected).norm() / expected.norm())
            worst = max(worst, error)
            if error > 1e-4:
                raise AdapterError(f"layer {layer}: folding its cache differs from its live run by {error:.1e}")
    yield (
        f"states   fold equals the live run within {worst:.0e}"
        if plan.mixer.foldable
        else "states   not foldable: live requests keep their level"
    )
    size = sum(file.stat().st_size for file in directory.glob("layer-*.safetensors"))
    in_memory = f"{adapter.nbytes / 2**20:.1f} MiB in memory at {str(dtype).removeprefix('torch.')}"
    yield f"size     {size / 2**20:.1f} MiB on disk, {in_memory}"
