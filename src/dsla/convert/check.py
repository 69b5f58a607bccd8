"""A full check of an adapter against its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dsla.convert.adapter import Adapter, layer_file, load_adapter
from dsla.convert.load import load_model, read_config
from dsla.convert.surgery import Levels
from dsla.errors import AdapterError
from dsla.families import attention_shape, context_length
from dsla.hub import model_hash


def check_adapter(directory: Path, model: Path, dtype: torch.dtype) -> Iterator[str]:
    """Checks hashes, shapes, that every value is finite, that every layer's live run and fold agree, and runs the whole model.

    Args:
        directory: the adapter.
        model: folder of its teacher.
        dtype: what everything is run in.

    Yields:
        A line for each thing found good.

    Raises:
        AdapterError: naming the first thing wrong.
        ModelError: if the model is damaged.
    """
    config = read_config(model)
    shape = attention_shape(config)
    adapter = load_adapter(directory, shape, model_hash(model), dtype)
    plan = adapter.plan
    if not adapter.mixers:
        raise AdapterError(f"{directory} holds no converted layer yet: finish its `dsla convert`")
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
    yield _run_levels(adapter, model, dtype)
    size = sum(file.stat().st_size for file in directory.glob("layer-*.safetensors"))
    in_memory = f"{adapter.nbytes / 2**20:.1f} MiB in memory at {str(dtype).removeprefix('torch.')}"
    yield f"size     {size / 2**20:.1f} MiB on disk, {in_memory}"


@torch.no_grad()
def _run_levels(adapter: Adapter, model: Path, dtype: torch.dtype) -> str:
    """Runs a short text at level 0 and at the highest level; says what was found."""
    net = load_model(model, dtype)
    length = min(adapter.plan.mixer.window + adapter.plan.mixer.sinks + 70, context_length(net.config))
    ids = torch.randint(net.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    teacher = net(ids).logits
    levels = Levels(net, adapter.plan, adapter.mixers)
    levels.set(adapter.max_level)
    if not net(ids).logits.isfinite().all():
        raise AdapterError(f"{adapter.path}: logits at level {adapter.max_level} are not finite")
    levels.set(0)
    if not torch.equal(net(ids).logits, teacher):
        raise AdapterError(f"{adapter.path}: level 0 differs from the teacher")
    return f"levels   0 equals the teacher bit for bit, {adapter.max_level} gives finite logits"
