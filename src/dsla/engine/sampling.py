"""What a request asks of sampling, and where its random numbers come from. `sampler` chooses the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from dsla.engine.constraint import TokenConstraint
from dsla.errors import RequestError

TokenLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""A chosen token's own `(token, logprob)`, then those of the most likely tokens, most likely first."""

MAX_LOGPROBS = 20
_SEEDS = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    The model's logits are edited first: repetition penalty, frequency and presence penalty, bias, end tokens that must not
    come yet, tokens that the constraint forbids. Then temperature, `top_k`, `top_p` and `min_p` apply in this order, each to
    what the one before it left.

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
        min_tokens: tokens generated before an end token or one of `stop_token_ids` may come.
        presence_penalty: subtracted from the logits of tokens in the output, -2 to 2.
        frequency_penalty: the same, as often as the token is in the output.
        repetition_penalty: logits of tokens in prompt or output are divided by it where positive, else multiplied; 0.01 to
            100, 1 = off.
        logit_bias: token id -> -100 to 100, added to its logit.
        logprobs: report logarithms of probabilities, of each chosen token and of this many of the most likely ones, 0 to 20;
            None = report none. They are the model's own: before all edits, at temperature 1.
        constraint: makes what says which tokens may come next, anew for each request, in the engine's thread; None = all
            may. Not together with `ignore_eos` and `min_tokens`: the constraint says where the output may end.
    """

    max_tokens: int | None = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    constraint: Callable[[], TokenConstraint] | None = None

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
        if self.min_tokens < 0:
            raise RequestError(f"min_tokens must be at least 0, found {self.min_tokens}", param="min_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            found = f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            raise RequestError(f"{found}: lower it, or raise max_tokens", param="min_tokens")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise RequestError(f"{name} must be in [-2, 2], found {getattr(self, name)}", param=name)
        if not 0.01 <= self.repetition_penalty <= 100:
            found = f"found {self.repetition_penalty}"
            raise RequestError(f"repetition_penalty must be in [0.01, 100], {found}", param="repetition_penalty")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias must be in [-100, 100], found {bias} for token {token}", param="logit_bias"
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs must be in 0 ... {MAX_LOGPROBS}, found {self.logprobs}", param="logprobs")
        for name in ("ignore_eos", "min_tokens"):
            if self.constraint is not None and getattr(self, name):
                found = f"{name} contradicts a format of the answer, which says where it may end"
                raise RequestError(f"{found}: leave one of them out", param=name)

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs to know which tokens there were."""
        return self.penalizes_output or self.repetition_penalty != 1

    @property
    def penalizes_output(self) -> bool:
        """Whether tokens are penalized by how often they are in the output."""
        return bool(self.presence_penalty or self.frequency_penalty)


def derive_seed(seed: int, index: int) -> int:
    """Seed of one of several answers to a request.

    Args:
        seed: of the request, 64 bits.
        index: place of the answer, from 0; 0 = `seed` itself.

    Returns:
        A seed of 63 bits, unrelated to those of other places.
    """
    if index == 0:
        return seed
    return int(np.random.SeedSequence(seed % 2**64, spawn_key=(index,)).generate_state(1, np.uint64)[0]) >> 1


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's token; depends on nothing but the arguments.

    Args:
        seed: of the request, 64 bits.
        index: place of the token in the request's output, from 0.
    """
    # A counter-based generator: the draw for token `index` needs no earlier draw. The upper 53 bits fill a double.
    bits: int = np.random.Philox(key=np.array([seed % 2**64, index], dtype=np.uint64)).random_raw()
    return (bits >> 11) * 2.0**-53
