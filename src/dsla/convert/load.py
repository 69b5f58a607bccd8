"""A pretrained model with its levels, in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dsla.convert.adapter import Adapter, load_adapter
from dsla.errors import AdapterError, ModelError
from dsla.families import attention_shape, family_of
from dsla.hub import model_hash, resolve_model

_SHIPPED = Path(__file__).parent.parent / "adapters"


def load(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    level: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Loads a Hugging Face model whose layers can be converted, and its tokenizer.

    `model.dsla.set(level)` changes the level later, in the middle of a generation too.

    Args:
        model: folder or hub name of a supported model. Default: SmolLM2-135M-Instruct, fetched once.
        adapter: adapter folder. Default: the shipped one that belongs to the model's weights, if there is one.
        level: how many layers of the adapter's order are converted.
        dtype: of the weights. Default: the checkpoint's.
        device: where the model goes.

    Returns:
        The model (in evaluation mode) and the tokenizer.

    Raises:
        ModelError: if the model cannot be had or its family is unknown.
        AdapterError: if the adapter is damaged, belongs to another model, or is missing for a level > 0.
        PlanError: if the level is out of range.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsla.convert.surgery import Levels

    path = resolve_model(model)
    config = read_config(path)
    family_of(config)
    found = find_adapter(path, config, adapter, dtype or config.dtype or torch.float32, device)
    if found is None and level:
        raise AdapterError(
            f"level {level} needs an adapter, and none is shipped for this model: convert it with `dsla convert`"
        )
    net: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    net = net.to(device).eval()
    if found is not None:
        net.dsla = Levels(net, found.plan, found.mixers)
        net.dsla.set(level)
    return net, AutoTokenizer.from_pretrained(path)


def read_config(path: Path) -> Any:
    """The Hugging Face config of a model folder.

    Raises:
        ModelError: if there is none, or transformers does not know its type.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{path} holds no config this version of transformers reads: {str(error).splitlines()[0]}"
        ) from None


def find_adapter(
    model: Path, config: Any, adapter: str | Path | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Adapter | None:
    """The named adapter, or the shipped one of the model's weights, or None.

    Args:
        model: the model's folder.
        config: its Hugging Face config.
        adapter: an adapter folder, or None for a shipped one.
        dtype: the model's.
        device: where the adapter's weights go.

    Raises:
        AdapterError: if it is damaged or belongs to another model.
    """
    digest, shape = model_hash(model), attention_shape(config)
    if adapter is not None:
        return load_adapter(Path(adapter), shape, digest, dtype, device)
    for plan in sorted(_SHIPPED.glob("*/plan.json")):
        if json.loads(plan.read_text(encoding="utf-8"))["teacher"]["sha256"] == digest:
            return load_adapter(plan.parent, shape, digest, dtype, device)
    return None
