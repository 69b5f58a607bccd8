"""Qwen2 and Qwen2.5 (biases on q, k and v) and Qwen3 (norms on query and key heads); otherwise Llama's shape."""

from __future__ import annotations

from dataclasses import replace

from dsla.families.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2", model_types=("qwen2",), qkv_bias=True, o_bias=False, mlp_bias=False)
QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",), q_norm="q_norm", k_norm="k_norm", mlp_bias=False)
