"""A tokenizer of characters and a tiny teacher, for conversions that take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsla.convert import Plan, Teacher
from dsla.distill.data import Source
from dsla.distill.recipe import DataSettings, Recipe, TrainSettings
from dsla.mixers import DslaConfig

TEXT = "The history state keeps what the recency state forgets; a window keeps both exact. "
TEACHER = Teacher("tiny", "0" * 64, 3)
PLAN = Plan(TEACHER, (1, 2, 0))
RECIPE = Recipe(
    mixer=DslaConfig(window=4, sinks=2, delta_rank=3),
    data=DataSettings(seq_len=32, tokens=512, valid_tokens=64),
    train=TrainSettings(epochs=2, batch_tokens=64, lr=0.02),
    seed=5,
)


class TinyTokenizer:
    """A token a character."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 128

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) % 128 for c in text] for text in texts]}


def write_text(folder: Path) -> list[Source]:
    """A file of eight documents, as a source of training text."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT * 5}"}) + "\n" for i in range(8)))
    return [Source(path)]


def teacher() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)
