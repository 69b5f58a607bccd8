"""Facts about model families: where attention sits, what its weights are called, how it rotates. One small file a family."""

from __future__ import annotations

from typing import Any

from dsla.errors import ModelError
from dsla.families.base import Family, attention_shape, context_length, rotate
from dsla.families.llama import LLAMA

FAMILIES = {model_type: family for family in (LLAMA,) for model_type in family.model_types}

__all__ = ["FAMILIES", "Family", "attention_shape", "context_length", "family_of", "rotate"]


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Args:
        config: a `PretrainedConfig`; its `model_type` decides.

    Raises:
        ModelError: if the family is unknown, naming it and those that are known.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model family {config.model_type!r} is not supported; supported families: {known}")
    return family
