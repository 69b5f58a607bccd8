"""Facts about model families: where attention sits, what its weights are called, how it rotates. One small file a family."""

from __future__ import annotations

from typing import Any

from dsla.errors import ModelError
from dsla.families.base import Family, attention_shape, context_length, rotate
from dsla.families.llama import LLAMA
from dsla.families.mistral import MISTRAL
from dsla.families.qwen import QWEN2, QWEN3

FAMILIES = {model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3) for model_type in family.model_types}

__all__ = ["FAMILIES", "Family", "attention_shape", "context_length", "family_of", "rotate"]


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Args:
        config: a `PretrainedConfig`; its `model_type` decides.

    Raises:
        ModelError: if the family is unknown, naming it and those that are known, or if a layer attends to a sliding window
            only, which no mixer here computes.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model family {config.model_type!r} is not supported; supported families: {known}")
    window = getattr(config, "sliding_window", None)
    everywhere = config.model_type == "mistral" and window is not None and window < config.max_position_embeddings
    if everywhere or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(
            f"this {family.name} model attends to a sliding window of {window} tokens, which is not supported"
        )
    return family
