"""Chooses the next token of every request of a step, from their logits.

A choice depends on the request's own logits, parameters, seed and output, to the bit: what runs on several rows at once
treats each as if it were alone. Rows that are not plainly greedy are computed on the CPU, in fp64, whatever the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsla.engine.logit_edits import LogitEdits
from dsla.engine.request import Request
from dsla.engine.sampling import SamplingParams, TokenLogprobs, uniform
from dsla.errors import EngineError

Row: TypeAlias = NDArray[np.float64]

_BLOCK = 8
"""Rows computed at once: few enough for their fp64 copies to stay in the cache."""

_BINS_PER_NAT = 8


@dataclass(frozen=True)
class Choice:
    """A chosen token.

    Attributes:
        token: its id.
        logprobs: its own `(token, logprob)`, then those of the most likely tokens, where the request asks for them.
    """

    token: int
    logprobs: TokenLogprobs | None = None


def choose(logits: Tensor, requests: Sequence[Request]) -> list[Choice | str]:
    """Chooses one token for each request.

    Args:
        logits: `[n, vocab]`, any float dtype and device.
        requests: `[n]`, whose rows they are.

    Returns:
        `[n]` choices; where there is none, why not.
    """
    highest, best = logits.max(-1)
    finite = (highest.isfinite() & logits.amin(-1).isfinite()).tolist()
    choices: list[Choice | str] = [
        Choice(token) if ok else "logits are not finite" for token, ok in zip(best.tolist(), finite, strict=True)
    ]
    work = [i for i, request in enumerate(requests) if finite[i] and not _is_plain(request.params)]
    for start in range(0, len(work), _BLOCK):
        block = work[start : start + _BLOCK]
        chosen = _choose_block(logits[block].cpu().double(), [requests[i] for i in block])
        for i, choice in zip(block, chosen, strict=True):
            choices[i] = choice
    return choices


def _is_plain(params: SamplingParams) -> bool:
    return params.temperature == 0 and params.logprobs is None and not LogitEdits.needed(params)


def _choose_block(rows: Tensor, requests: Sequence[Request]) -> list[Choice | str]:
    """Choices for finite rows `[n, vocab]`, fp64, which are overwritten."""
    reported = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    logprobs = dict(zip(reported, rows[reported].log_softmax(-1).numpy(), strict=True))
    failed: dict[int, str] = {}
    for i, (row, request) in enumerate(zip(rows.numpy(), requests, strict=True)):
        try:
            _edit(row, request)
        except EngineError as error:
            failed[i] = str(error)
    tokens = _tokens(rows, requests)
    return [
        failed.get(i)
        or Choice(token, _report(logprobs[i], token, request.params.logprobs or 0) if i in logprobs else None)
        for i, (token, request) in enumerate(zip(tokens, requests, strict=True))
    ]


def _edit(row: Row, request: Request) -> None:
    if LogitEdits.needed(request.params):
        if request.edits is None:
            request.edits = LogitEdits(request.params, request.prompt, request.end_tokens)
        request.edits.apply(row, request.output)


def _report(logprobs: Row, token: int, count: int) -> TokenLogprobs:
    top = _most_likely(logprobs, count) if count else ()
    return tuple((int(i), float(logprobs[i])) for i in (token, *top))


def _tokens(rows: Tensor, requests: Sequence[Request]) -> list[int]:
    tokens = [0] * len(requests)
    greedy: list[int] = []
    few: list[int] = []
    many: list[int] = []
    for i, request in enumerate(requests):
        params = request.params
        (greedy if params.temperature == 0 else few if 0 < params.top_k < rows.shape[1] else many).append(i)
    for i in greedy:
        tokens[i] = int(rows[i].numpy().argmax())
    for i in few:
        row, params = rows[i].numpy(), requests[i].params
        ids = _most_likely(row, params.top_k)
        scores = torch.from_numpy(row[ids] - row[ids[0]]).div_(params.temperature)
        places, likely = _restricted(scores.numpy(), scores.softmax(0).numpy(), params)
        tokens[i] = _draw(ids if places is None else ids[places], likely, requests[i])
    if many:
        temperature = torch.tensor([requests[i].params.temperature for i in many], dtype=torch.float64).unsqueeze(1)
        scores = rows[many]
        # The maximum goes first: divided by a tiny temperature, two large scores would both be infinite.
        scores = scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature)
        probabilities = scores.softmax(-1)
        for i, score, row in zip(many, scores.numpy(), probabilities.numpy(), strict=True):
            tokens[i] = _draw(*_restricted(score, row, requests[i].params), requests[i])
    return tokens


def _restricted(scores: Row, probabilities: Row, params: SamplingParams) -> tuple[NDArray[np.int64] | None, Row]:
    """Applies `top_p`, then `min_p`.

    Args:
        scores: `[n]`, the highest is 0.
        probabilities: `[n]`, their softmax.
        params: what is asked for.

    Returns:
        places of the tokens that are left, or None for all of them, and their probabilities.
    """
    places = None
    if params.top_p < 1:
        places = _nucleus(scores, probabilities, params.top_p)
        probabilities = probabilities[places]
    if params.min_p:
        likely = np.flatnonzero(probabilities >= params.min_p * probabilities.max())
        places = likely if places is None else places[likely]
        probabilities = probabilities[likely]
    return places, probabilities


def _draw(ids: NDArray[np.int64] | None, probabilities: Row, request: Request) -> int:
    """One of `ids` (None: of all), drawn with `probabilities`, which need not sum to 1."""
    cumulative = torch.from_numpy(probabilities).cumsum(0).numpy()
    total = cumulative[-1]
    # Rounding must not lift the target to the total: no token lies beyond it.
    target = min(uniform(request.seed, len(request.output)) * total, np.nextafter(total, 0.0))
    chosen = int(cumulative.searchsorted(target, side="right"))
    return chosen if ids is None else int(ids[chosen])


def _most_likely(row: Row, count: int) -> NDArray[np.int64]:
    """Ids of the `count` highest entries, highest first; of equal ones, lower ids first."""
    count = min(count, len(row))
    lowest = torch.from_numpy(row).topk(count, sorted=False).values.min().item()
    return _descending(row, np.flatnonzero(row >= lowest))[:count]


def _descending(row: Row, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """`ids`, which ascend, by falling entries of `row`, equal ones still ascending."""
    return ids[(-row[ids]).argsort(kind="stable")]


def _nucleus(scores: Row, probabilities: Row, top_p: float) -> NDArray[np.int64]:
    """Places, ascending, of the fewest tokens whose probabilities reach `top_p`; of equally likely ones, lower ids first.

    Nothing is sorted but one bin of scores. Tokens less likely than `(1 - top_p) / n` cannot make up `1 - top_p` together,
    so that none of them belongs to it; of the rest, it ends in the bin in which the sum over bins reaches `top_p`.
    """
    places = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    bins = (scores[places] * -_BINS_PER_NAT).astype(np.int64)
    reached = np.bincount(bins, probabilities[places]).cumsum()
    last = int(reached.searchsorted(top_p))
    inside = bins < last
    ordered = _descending(scores[places], np.flatnonzero(bins == last))
    before = (reached[last - 1] if last else 0.0) + probabilities[places[ordered]].cumsum()
    inside[ordered[: 1 + int((before[:-1] < top_p).sum())]] = True
    return places[inside]
