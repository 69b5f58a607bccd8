"""What one step computes: the new tokens of several requests, packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

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

    @property
    def is_decode(self) -> bool:
        """Whether it has one new token."""
        return len(self.tokens) == 1


class PackedBatch:
    """Segments as they are packed, with what every layer needs to know of them.

    Decodes come first, those with few converted layers before those with many, then chunks the other way round. Since levels
    are prefixes of one order, whatever one kind of mixing takes lies side by side in every layer.

    Args:
        segments: at least one, in any order.
        device: of the model.

    Attributes:
        segments: in packing order.
        starts: first row of each segment, and at last the number of rows T.
        tokens: `[T]` int64.
        positions: `[T]` int64.
        sample_rows: row of the last token of each segment that is sampled, `[n_samples]` int64, in the order they were given.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device | str = "cpu") -> None:
        order = sorted(range(len(segments)), key=lambda i: _place(segments[i]))
        self.segments = [segments[i] for i in order]
        self.starts, positions = [0], []
        last_rows = [0] * len(segments)
        for i, segment in zip(order, self.segments, strict=True):
            self.starts.append(self.starts[-1] + len(segment.tokens))
            last_rows[i] = self.starts[-1] - 1
            positions.append(np.arange(segment.n_prior, segment.n_prior + len(segment.tokens)))
        self.tokens = torch.tensor([token for segment in self.segments for token in segment.tokens], device=device)
        self.positions = torch.from_numpy(np.concatenate(positions)).to(device)
        sampled = [row for row, segment in zip(last_rows, segments, strict=True) if segment.sample]
        self.sample_rows = torch.tensor(sampled, dtype=torch.int64, device=device)
        self._n_decodes = sum(segment.is_decode for segment in segments)
        self._splits: dict[tuple[int, int], Split] = {}

    def split(self, layer: int) -> Split:
        """Which rows of `layer` softmax attention mixes and which the converted layer's mixer."""
        kept = [segment.memory.is_kept(layer) for segment in self.segments]
        ends = sum(kept[: self._n_decodes]), len(kept) - sum(kept[self._n_decodes :])
        if not all(kept[: ends[0]]) or any(kept[ends[0] : ends[1]]):
            raise ValueError(f"layer {layer}: the levels of a batch must be prefixes of one order")
        if ends not in self._splits:
            self._splits[ends] = Split(self, ends[0], self._n_decodes, ends[1])
        return self._splits[ends]

    def rows(self, first: int, end: int) -> slice:
        """Rows of the segments from `first` up to `end`."""
        return slice(self.starts[first], self.starts[end])


class Split:
    """The parts of a batch by how a layer mixes them; shared by all layers where the same requests are converted.

    Args:
        batch: the batch.
        converted: the first segment that is converted.
        chunks: the first with several new tokens.
        kept: the first of those that keep the layer; all up to `converted` do so, too.

    Attributes:
        kept_decodes: segments with one new token that softmax attention mixes.
        kept_chunks: those with several, each with its rows.
        decodes: converted segments with one new token.
        chunks: converted segments with several, each with its rows.
        kept_rows: rows of `kept_decodes`.
        kept_lengths: tokens each of `kept_decodes` has seen before, `[n]` int64.
        decode_rows: rows of `decodes`.
        decode_lengths: tokens each of `decodes` has seen before, `[n]` int64.
        converted_rows: rows of `decodes` and `chunks`.
        any_converted: whether there are some.
    """

    def __init__(self, batch: PackedBatch, converted: int, chunks: int, kept: int) -> None:
        segments, count = batch.segments, len(batch.segments)
        self.kept_decodes, self.decodes = segments[:converted], segments[converted:chunks]
        self.chunks, self.kept_chunks = (
            [(segments[i], batch.rows(i, i + 1)) for i in range(first, end)]
            for first, end in ((chunks, kept), (kept, count))
        )
        self.kept_rows, self.decode_rows = batch.rows(0, converted), batch.rows(converted, chunks)
        self.kept_lengths, self.decode_lengths = batch.positions[self.kept_rows], batch.positions[self.decode_rows]
        self.converted_rows = batch.rows(converted, kept)
        self.any_converted = converted < kept


def _place(segment: Segment) -> tuple[bool, int]:
    kept = segment.memory.kept_layers
    return (False, -kept) if segment.is_decode else (True, kept)
