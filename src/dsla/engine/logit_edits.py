"""What changes the logits of one request before a token is chosen: penalties, bias, and tokens that must not come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsla.engine.sampling import SamplingParams
from dsla.errors import EngineError


class TokenCounts:
    """How often tokens occurred in a request's output, and which there are in its prompt; grows token by token.

    Args:
        prompt: token ids that are listed with a count of 0.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = np.fromiter(self._places, np.int64, len(self._places))
        self._counts = np.zeros(len(self._places))
        self._known = 0

    def update(self, output: Sequence[int]) -> None:
        """Counts what was added to `output` since the last call."""
        for token in output[self._known :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                room = max(16, place)
                self._tokens = np.concatenate([self._tokens, np.zeros(room, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room)])
            self._tokens[place] = token
            self._counts[place] += 1
        self._known = len(output)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The token ids `[n]`, each once."""
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float64]:
        """How often each of them is in the output `[n]`."""
        return self._counts[: len(self._places)]


class LogitEdits:
    """Edits the logits of one request, which owns it.

    Args:
        params: what to do.
        prompt: token ids.
        end_tokens: token ids that `min_tokens` holds back.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], end_tokens: frozenset[int]) -> None:
        self._params = params
        self._seen = TokenCounts(prompt if params.repetition_penalty != 1 else ()) if params.counts_tokens else None
        self._biased = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))
        self._ends = np.fromiter(end_tokens, np.int64, len(end_tokens))
        self._constraint = params.constraint() if params.constraint is not None else None

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether `params` ask for any edit."""
        return bool(params.counts_tokens or params.logit_bias or params.min_tokens or params.constraint)

    def apply(self, row: NDArray[np.float64], output: Sequence[int]) -> None:
        """Edits logits in place.

        Args:
            row: `[vocab]`.
            output: all tokens generated so far.

        Raises:
            EngineError: no token may come next, or the constraint cannot say which.
        """
        params = self._params
        if self._seen is not None:
            self._seen.update(output)
            tokens, counts = self._seen.tokens, self._seen.counts
            logits = row[tokens]
            if params.repetition_penalty != 1:
                logits = np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            if params.penalizes_output:
                logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            row[tokens] = logits
        row[self._biased] += self._bias
        if len(output) < params.min_tokens:
            row[self._ends] = -np.inf
        if self._constraint is not None:
            allowed = self._constraint.allowed(output)
            if not allowed.any():
                raise EngineError("the constraint allows no token")
            row[~allowed] = -np.inf
