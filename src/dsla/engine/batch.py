"""What one step computes: the new tokens of several requests, packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dsla.engine.memory import RequestMemory


@dataclass(frozen=True)
class Segment:
    """The new tokens of one request.

    Attributes:
        memory: what the request remembers, with room for the new tokens.
        tokens: new token ids, at least one.
        n_prior: tokens it has seen before.
        sample: whether logits after the last token are wanted.
    """

    memory: RequestMemory
    tokens: Sequence[int]
    n_prior: int
    sample: bool


class PackedBatch:
    """Segments in packing order, with what every layer needs to know of them.

    Args:
        segments: at least one.
        page_tokens: of the arena.
        device: of the model.

    Attributes:
        segments: as given.
        starts: first row of each segment.
        tokens: `[T]` int64.
        positions: `[T]` int64.
        sample_rows: row of the last token of each segment that is sampled, `[n_samples]` int64, in packing order.
    """

    def __init__(self, segments: Sequence[Segment], page_tokens: int, device: torch.device | str = "cpu") -> None:
        self.segments = segments
        self.page_tokens, self.device = page_tokens, device
        self.starts: list[int] = []
        positions: list[np.ndarray] = []
        row, sampled = 0, []
        for segment in self.segments:
            self.starts.append(row)
            row += len(segment.tokens)
            positions.append(np.arange(segment.n_prior, segment.n_prior + len(segment.tokens)))
            if segment.sample:
                sampled.append(row - 1)
        self.tokens = torch.tensor([token for segment in self.segments for token in segment.tokens], device=device)
        self.positions = torch.from_numpy(np.concatenate(positions)).to(device)
        self.sample_rows = torch.tensor(sampled, dtype=torch.int64, device=device)
        self._splits: dict[tuple[bool, ...], Split] = {}

    def split(self, layer: int) -> Split:
        """Which rows of `layer` softmax attention mixes and which the converted layer's mixer."""
        kept = tuple(segment.memory.is_kept(layer) for segment in self.segments)
        if kept not in self._splits:
            self._splits[kept] = Split(self, kept)
        return self._splits[kept]

    def rows(self, members: Sequence[int]) -> Tensor | slice:
        """Rows of some segments: a slice where they lie side by side in order, else `[n]` int64."""
        spans = [(self.starts[i], self.starts[i] + len(self.segments[i].tokens)) for i in members]
        if all(end == start for (_, end), (start, _) in pairwise(spans)):
            return slice(spans[0][0], spans[-1][1])
        return torch.from_numpy(np.concatenate([np.arange(*span) for span in spans])).to(self.device)


class Split:
    """Members and rows of a layer's two kinds of mixing; shared by all layers where the same requests are converted.

    Args:
        batch: the batch.
        kept: per segment, whether it keeps keys and values in this layer.

    Attributes:
        kept_decodes: segments with one new token that softmax attention mixes.
        kept_chunks: those with several.
        decodes: converted segments with one new token.
        chunks: converted segments with several.
    """

    def __init__(self, batch: PackedBatch, kept: tuple[bool, ...]) -> None:
        self._batch = batch
        parts: dict[tuple[bool, bool], list[int]] = {}
        for i, segment in enumerate(batch.segments):
            parts.setdefault((kept[i], len(segment.tokens) == 1), []).append(i)
        self.kept_decodes, self.kept_chunks = parts.get((True, True), []), parts.get((True, False), [])
        self.decodes, self.chunks = parts.get((False, True), []), parts.get((False, False), [])

    @cached_property
    def kept_rows(self) -> Tensor | slice:
        """Rows of `kept_decodes`."""
        return self._batch.rows(self.kept_decodes)

    @cached_property
    def kept_lengths(self) -> Tensor:
        """Tokens each of `kept_decodes` has seen before, `[n]` int64."""
        return self._batch.positions[self.kept_rows]

    @cached_property
    def decode_rows(self) -> Tensor | slice:
        """Rows of `decodes`."""
        return self._batch.rows(self.decodes)

    @cached_property
    def decode_lengths(self) -> Tensor:
        """Tokens each of `decodes` has seen before, `[n]` int64."""
        return self._batch.positions[self.decode_rows]

    @cached_property
    def converted_rows(self) -> Tensor | slice:
        """Rows of `decodes` and `chunks`."""
        return self._batch.rows(sorted(self.decodes + self.chunks))

    @property
    def any_converted(self) -> bool:
        """Whether some row is mixed by the converted layer's mixer."""
        return bool(self.decodes or self.chunks)
