"""Text that the model under training writes itself, so that it is corrected where its own words lead (arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsla.convert.surgery import Levels


def continued(model: Any, levels: Levels) -> Callable[[Tensor, int, int], Tensor]:
    """A function that keeps the first half of each row and lets the model write the second, sampling at temperature 1.

    Args:
        model: the model `levels` belongs to.
        levels: its levels.

    Returns:
        (token ids `[rows, T]`, level, seed) -> token ids `[rows, T]`.
    """

    @torch.no_grad()
    def write(rows: Tensor, level: int, seed: int) -> Tensor:
        length, device = rows.shape[1], next(model.parameters()).device
        prompt = rows[:, : length // 2].to(device)
        levels.set(level)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written: Tensor = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=length - prompt.shape[1],
                max_new_tokens=length - prompt.shape[1],
                pad_token_id=0,
            )
        return written.cpu()

    return write
