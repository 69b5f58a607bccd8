"""Perplexity over fixed windows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        model: a Hugging Face causal language model.
        windows: token ids `[n, T]`; no beginning-of-text token is added.

    Returns:
        The perplexity.
    """
    device = next(model.parameters()).device
    total = 0.0
    for window in windows.to(device):
        logits = model(window.unsqueeze(0)).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
