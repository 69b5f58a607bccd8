"""Mistral: Llama's shape without biases. Checkpoints that attend to a sliding window only are refused by `family_of`."""

from __future__ import annotations

from dataclasses import replace

from dsla.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    all_slide=True,
)
