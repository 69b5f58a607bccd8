"""The token windows of the recipe search."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

_CHARS_PER_TOKEN = 6


def text_windows(tokenizer: Any, documents: list[str], length: int, count: int, seed: int) -> Tensor:
    """`count` windows `[count, length]` of pieces of shuffled documents, an end-of-text token after each piece."""
    order, ids, size = list(documents), list[int](), length * _CHARS_PER_TOKEN
    random.Random(seed).shuffle(order)
    for text in order:
        start = random.Random(seed + len(text)).randrange(max(len(text) - size, 1))
        ids += [*tokenizer(text[start : start + size], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise SystemExit(f"the text holds {len(ids)} tokens, {count * length} are needed")


def long_windows(tokenizer: Any, documents: list[str], length: int, count: int) -> Tensor:
    """Windows `[count, length]` from the middle of each of the `count` longest documents."""
    rows = []
    for text in sorted(documents, key=len)[-count:]:
        ids = tokenizer(text[len(text) // 2 :][: length * 2 * _CHARS_PER_TOKEN], add_special_tokens=False)["input_ids"]
        rows.append(ids[:length])
    if min(len(row) for row in rows) < length:
        raise SystemExit(f"{count} documents of {2 * length} tokens are needed for the windows of {length}")
    return torch.tensor(rows)
