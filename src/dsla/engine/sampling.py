"""What a request asks of sampling, and the choice of a token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsla.errors import RequestError

_SEEDS = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Attributes:
        max_tokens: tokens generated at most, and memory for them is promised; None = `EngineConfig.open_ended_tokens`,
            or fewer where the model's context or the memory budget does not hold so many.
        temperature: 0 = the most likely token (greedy).
        top_p: smallest set of most likely tokens whose probabilities reach `top_p`; 1 = all.
        top_k: the k most likely tokens; 0 = all.
        min_p: tokens at least `min_p` times as likely as the most likely one; 0 = all.
        seed: makes sampling repeatable; None = a random one. A draw depends on seed and place in the output only.
        stop_token_ids: tokens that end a request, beside the model's own end tokens. They are not part of the output.
            The engine sees no text: whoever makes text of its tokens looks for stop texts, and cancels the request.
        ignore_eos: go on after the model's end tokens.
    """

    max_tokens: int | None = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, found {self.max_tokens}", param="max_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature must be >= 0 and finite, found {self.temperature}", param="temperature")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be in (0, 1], found {self.top_p}", param="top_p")
        if self.top_k < 0:
            raise RequestError(f"top_k must be >= 0 (0 = all tokens), found {self.top_k}", param="top_k")
        if not 0 <= self.min_p < 1:
            raise RequestError(f"min_p must be in [0, 1), found {self.min_p}", param="min_p")
        if self.seed is not None and not -_SEEDS <= self.seed < _SEEDS:
            raise RequestError(f"seed must be a 64-bit integer, found {self.seed}", param="seed")


def sample(logits: Tensor, params: SamplingParams, seed: int, index: int) -> int:
    """Chooses one token.

    Args:
        logits: `[vocab]`, finite.
        params: how to choose.
        seed: of the request.
        index: place of the token in the request's output, from 0.

    Returns:
        The token id.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    scores, order = logits.double().sort(descending=True, stable=True)
    # The maximum goes first: divided by a tiny temperature, two large scores would both be infinite.
    scores = (scores - scores[0]) / params.temperature
    probabilities = scores.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        keep &= probabilities.cumsum(0) - probabilities < params.top_p
    if params.min_p:
        keep &= probabilities >= params.min_p * probabilities[0]
    # A counter-based generator: the draw for token `index` needs no earlier draw.
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key)).random()
    cumulative = (probabilities * keep).cumsum(0)
    choice = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(order[min(choice, int(keep.sum()) - 1)])
