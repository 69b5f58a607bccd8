"""How long a step takes, from what it computes: a sum of terms whose seconds were measured (`dsla.engine.measure`).

step = base + kept layers x kept_layer + converted layers x converted_layer (layers that are so for any of its requests)
     + decode rows x row + prompt tokens x token
     + pairs of a prompt token and a key it reads, over kept layers x prefill_pair
     + pairs of a decode row and a key it reads, over kept layers   x decode_pair
     + prompt tokens x converted layers x prefill_converted
     + decode rows x converted layers   x decode_converted
fold of one layer = fold + cached tokens x fold_token
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, fields

from dsla.errors import EngineError


@dataclass(frozen=True)
class StepWork:
    """What one step computes, as the counts its time is linear in; the work of several requests adds up.

    Attributes:
        kept_layers: layers that some request keeps. Since levels are prefixes of one order, that is the most of any request.
        converted_layers: layers that are converted for some request, likewise.
        decode_rows: requests that compute one token.
        prefill_tokens: tokens of prompt chunks.
        prefill_pairs: keys read by tokens of prompt chunks, summed over tokens and kept layers.
        decode_pairs: keys read by decode rows, summed over rows and kept layers.
        prefill_converted: tokens of prompt chunks, summed over converted layers.
        decode_converted: decode rows, summed over converted layers.
    """

    kept_layers: int = 0
    converted_layers: int = 0
    decode_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_pairs: int = 0
    prefill_converted: int = 0
    decode_converted: int = 0

    @classmethod
    def decode(cls, context: int, kept: int, converted: int) -> StepWork:
        """The next token of a request.

        Args:
            context: tokens it has seen before.
            kept: layers with full attention.
            converted: layers that are converted.
        """
        return cls(kept, converted, decode_rows=1, decode_pairs=(context + 1) * kept, decode_converted=converted)

    @classmethod
    def prefill(cls, tokens: int, prior: int, kept: int, converted: int) -> StepWork:
        """A chunk of a prompt.

        Args:
            tokens: its length.
            prior: tokens the request has seen before.
            kept: layers with full attention.
            converted: layers that are converted.
        """
        return cls(
            kept,
            converted,
            prefill_tokens=tokens,
            prefill_pairs=_pairs(tokens, prior) * kept,
            prefill_converted=tokens * converted,
        )

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            max(self.kept_layers, other.kept_layers),
            max(self.converted_layers, other.converted_layers),
            self.decode_rows + other.decode_rows,
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_pairs + other.prefill_pairs,
            self.decode_pairs + other.decode_pairs,
            self.prefill_converted + other.prefill_converted,
            self.decode_converted + other.decode_converted,
        )


@dataclass(frozen=True)
class CostModel:
    """Seconds of everything a step or a conversion does, on one machine with one model.

    Attributes:
        base: of a step, whatever it computes.
        kept_layer: of a layer that some request of a step keeps.
        converted_layer: of a layer that is converted for some request of a step.
        row: of a decode row.
        token: of a token of a prompt chunk.
        prefill_pair: of a token of a prompt chunk and a key it reads, in one kept layer.
        decode_pair: of a decode row and a key it reads, in one kept layer.
        prefill_converted: of a token of a prompt chunk in one converted layer.
        decode_converted: of a decode row in one converted layer.
        fold: of converting one layer of a request.
        fold_token: of each of the tokens cached then.
    """

    base: float
    kept_layer: float
    converted_layer: float
    row: float
    token: float
    prefill_pair: float
    decode_pair: float
    prefill_converted: float
    decode_converted: float
    fold: float
    fold_token: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise EngineError(
                    f"cost {field.name} must be a number of seconds >= 0, found {value}: measure it again"
                )

    def step_seconds(self, work: StepWork) -> float:
        """Seconds of a step that computes `work`."""
        return (
            self.base
            + work.kept_layers * self.kept_layer
            + work.converted_layers * self.converted_layer
            + work.decode_rows * self.row
            + work.prefill_tokens * self.token
            + work.prefill_pairs * self.prefill_pair
            + work.decode_pairs * self.decode_pair
            + work.prefill_converted * self.prefill_converted
            + work.decode_converted * self.decode_converted
        )

    def fold_seconds(self, tokens: int) -> float:
        """Seconds to convert one layer of a request with `tokens` cached tokens."""
        return self.fold + tokens * self.fold_token if tokens else 0.0

    def prefill_tokens_within(
        self, seconds: float, limit: int, prior: int, kept: int, converted: int, beside: StepWork | None = None
    ) -> int:
        """The longest prompt chunk that keeps a step within a bound.

        Args:
            seconds: the bound.
            limit: tokens of the chunk, at most: those the prompt still has, say.
            prior: tokens the request has seen before.
            kept: layers with full attention.
            converted: layers that are converted.
            beside: what the step computes besides. Default: nothing.

        Returns:
            Tokens, 0 if not even one fits.
        """
        beside = beside or StepWork()
        return bisect_right(
            range(1, limit + 1),
            seconds,
            key=lambda tokens: self.step_seconds(beside + StepWork.prefill(tokens, prior, kept, converted)),
        )

    def prompt_seconds(self, tokens: int, prior: int, kept: int, converted: int, chunk: int) -> float:
        """Seconds to read `tokens` more tokens of a prompt in chunks of `chunk`, with nothing beside them.

        For the time a queue of prompts takes, add those of its prompts. Arguments as `StepWork.prefill`.
        """
        whole = self.step_seconds(StepWork.prefill(tokens, prior, kept, converted))
        again = self.base + kept * self.kept_layer + converted * self.converted_layer
        return whole + (-(-tokens // chunk) - 1) * again if tokens else 0.0

    @property
    def break_even_keys(self) -> float:
        """Keys from which on a decode row saves time in a converted layer, but for what the layer costs the whole step."""
        return self.decode_converted / self.decode_pair if self.decode_pair else math.inf

    def decode_saving_per_layer(self, context: int, rows: int = 1, converted_rows: int = 1) -> float:
        """Seconds one more converted layer saves of each next token of a request; negative where it costs time.

        What a layer costs a step, however many rows it has, is shared: a layer that some keep and others have converted
        costs both.

        Args:
            context: tokens the request has seen.
            rows: requests that decode together.
            converted_rows: those of them for which layers are converted, this one among them.
        """
        shared = self.kept_layer / rows - self.converted_layer / converted_rows
        return (context + 1) * self.decode_pair - self.decode_converted + shared

    def prefill_saving_per_layer(self, tokens: int, prior: int = 0) -> float:
        """Seconds one more converted layer saves of the rest of a prompt; negative where it costs time.

        What the layer costs a step, however many tokens it has, is left out: a chunk of a prompt has many.

        Args:
            tokens: tokens of the prompt that are not computed yet.
            prior: those that are.
        """
        return _pairs(tokens, prior) * self.prefill_pair - tokens * self.prefill_converted

    def saving_per_layer(
        self, tokens: int, new_tokens: int, prior: int = 0, rows: int = 1, converted_rows: int = 1
    ) -> float:
        """Seconds one more converted layer saves of the rest of a request, without what its fold costs.

        Args:
            tokens: tokens of the prompt that are not computed yet.
            new_tokens: tokens it is expected to generate yet.
            prior: tokens it has seen.
            rows: as for `decode_saving_per_layer`.
            converted_rows: likewise.
        """
        keys = _pairs(new_tokens, prior + tokens) - new_tokens
        row = self.decode_saving_per_layer(0, rows, converted_rows)
        return self.prefill_saving_per_layer(tokens, prior) + keys * self.decode_pair + new_tokens * row

    def request_seconds(self, tokens: int, new_tokens: int, layers: int, prior: int = 0, rows: int = 1) -> float:
        """Seconds the rest of a request takes with full attention, its share of what steps cost whatever they compute.

        Args:
            tokens: tokens of the prompt that are not computed yet.
            new_tokens: tokens it is expected to generate yet.
            layers: of the model.
            prior: tokens it has seen.
            rows: requests that decode together.
        """
        keys = _pairs(new_tokens, prior + tokens)
        prefill = tokens * self.token + layers * _pairs(tokens, prior) * self.prefill_pair
        share = (self.base + layers * self.kept_layer) / rows
        return prefill + layers * keys * self.decode_pair + new_tokens * (self.row + share)


@dataclass(frozen=True)
class Correction:
    """How much slower than predicted steps are now: other programs use the machine too.

    Attributes:
        ratio: factor for predicted seconds; the geometric mean of measured / predicted, newer steps weighing more.
    """

    ratio: float = 1.0

    def after(self, predicted: float, measured: float) -> Correction:
        """The correction after one more step; one that was predicted or measured as no time at all says nothing.

        Args:
            predicted: seconds by the cost model, uncorrected.
            measured: seconds it took.
        """
        if predicted <= 0 or measured <= 0:
            return self
        low, high = _RATIOS
        found = min(max(measured / predicted, low), high)
        return Correction(self.ratio ** (1 - _NEWEST) * found**_NEWEST)


_RATIOS = (1 / 64, 64.0)
_NEWEST = 0.1


def _pairs(tokens: int, prior: int) -> int:
    """Keys that `tokens` tokens after `prior` others read, each itself among them."""
    return tokens * prior + tokens * (tokens + 1) // 2
