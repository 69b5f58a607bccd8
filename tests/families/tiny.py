"""Tiny random models of every family: every bias, norm, head width, grouping and tying that decides how one is computed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 60, "pad_token_id": None,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
UNGROUPED = {"num_key_value_heads": 4}
ONE_GROUP = {"num_key_value_heads": 1}


def _sized(*changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {key: value for change in (SIZES, *changes, more) for key, value in change.items()}


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_sized(head_dim=6)),
    "llama, biases": LlamaConfig(**_sized(TIED, head_dim=6, attention_bias=True, mlp_bias=True)),
    "llama, one group, gelu": LlamaConfig(**_sized(ONE_GROUP, head_dim=10, hidden_act="gelu")),
    "mistral": MistralConfig(**_sized(head_dim=8, sliding_window=None)),
    "mistral, ungrouped": MistralConfig(**_sized(TIED, UNGROUPED, sliding_window=None)),
    "qwen2": Qwen2Config(**_sized(TIED)),
    "qwen2, one group": Qwen2Config(**_sized(ONE_GROUP, head_dim=10)),
    "qwen3": Qwen3Config(**_sized(head_dim=8)),
    "qwen3, biases": Qwen3Config(**_sized(TIED, UNGROUPED, head_dim=8, attention_bias=True)),
    "phi": PhiConfig(**_sized(UNGROUPED, head_dim=8, partial_rotary_factor=0.5)),
    "phi, head norms": PhiConfig(**_sized(TIED, qk_layernorm=True, partial_rotary_factor=0.67)),
    "phi3": Phi3Config(**_sized(hidden_size=32, partial_rotary_factor=0.75)),
    "phi3, one group": Phi3Config(**_sized(TIED, ONE_GROUP, head_dim=10)),
}


def random_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `config` whose norms and biases are random too."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
