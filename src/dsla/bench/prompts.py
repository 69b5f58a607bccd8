"""Token ids of a trace's prompts: random, the same each time, and shared where the trace says so."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from dsla.bench.trace import TraceRequest

FIRST_TOKEN = 256
"""Ids below it are left out: most vocabularies begin with special tokens and single bytes."""

_SHARED, _OWN = 0, 1


def prompt_tokens(request: TraceRequest, index: int, seed: Sequence[int], vocabulary: int) -> list[int]:
    """The prompt of a request.

    Args:
        request: of the trace, scaled or not.
        index: its place in the run.
        seed: of the run: other seeds give other prompts, so that nothing of an earlier run can be reused.
        vocabulary: ids are below it.

    Returns:
        Random ids. Requests with the same `hash_ids` at the same place have the same ids there.
    """
    if not request.hash_ids:
        return _tokens((*seed, _OWN, index), request.prompt_tokens, vocabulary)
    size, tokens = ceil(request.block_tokens), list[int]()
    for block, name in enumerate(request.hash_ids):
        end = min(ceil((block + 1) * request.block_tokens), request.prompt_tokens)
        tokens += _tokens((*seed, _SHARED, name), size, vocabulary)[: max(end - len(tokens), 0)]
    # Rounding may leave the last block a token short.
    return tokens + _tokens((*seed, _OWN, index), request.prompt_tokens - len(tokens), vocabulary)


def _tokens(seed: tuple[int, ...], count: int, vocabulary: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(FIRST_TOKEN, vocabulary, count).tolist()
    return found
