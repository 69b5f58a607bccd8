"""Facts about model families: where attention sits, what its weights are called, how it rotates. One small file a family."""

from __future__ import annotations

from typing import Any

from dsla.errors import ModelError
from dsla.families.base import ACTIVATIONS, NORM_EPS, STATIC_ROPE, Family, attention_shape, context_length
from dsla.families.llama import LLAMA
from dsla.families.mistral import MISTRAL
from dsla.families.phi import PHI, PHI3
from dsla.families.qwen import QWEN2, QWEN3

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI, PHI3)
FAMILIES = {model_type: family for family in _ALL for model_type in family.model_types}

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "NORM_EPS",
    "Family",
    "attention_shape",
    "context_length",
    "family_of",
]


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config, its facts as the config says them.

    Args:
        config: a `PretrainedConfig`; its `model_type` decides.

    Raises:
        ModelError: if the family is unknown, naming it and those that are known, or if the config asks for what is not
            supported: sliding windows, quantised weights, another activation, rope whose angles depend on the length.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model family {config.model_type!r} is not supported; supported families: {known}")
    refused = _refused(config, family)
    if refused:
        raise ModelError(f"this {family.name} model {refused}, which is not supported")
    return family.settled(config)


def _refused(config: Any, family: Family) -> str | None:
    """What a config asks for that no face of the model computes; None = nothing."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    if "sliding_attention" in types or (family.all_slide and window):
        return f"attends to a sliding window of {window} tokens"
    if getattr(config, "quantization_config", None):
        return "has quantised weights"
    if config.hidden_act not in ACTIVATIONS:
        return f"has the activation {config.hidden_act!r}"
    rope = (config.rope_parameters or {}).get("rope_type")
    if rope not in STATIC_ROPE:
        return f"has rope type {rope!r}"
    return None
