"""What a decode step must read and write at least, and how fast this machine reads."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dsla.engine import PackedDecoder

_BUFFER_BYTES = 400_000_000
_TRIES = 5


@dataclass(frozen=True)
class StepBytes:
    """Bytes a decode step moves at least.

    Attributes:
        weights: read once, whatever the batch.
        kv: keys and values read.
        states: memory of converted layers, read, and the states among it written.
    """

    weights: int
    kv: int
    states: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv + self.states


def read_bandwidth(buffer_bytes: int = _BUFFER_BYTES) -> float:
    """Bytes a second that summing a large buffer reads with all threads of this process; the best of a few tries."""
    buffer = torch.ones(buffer_bytes // 4)
    best = float("inf")
    for _ in range(_TRIES):
        begun = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - begun)
    return buffer.nbytes / best


def step_bytes(decoder: PackedDecoder, level: int, context: int, batch: int) -> StepBytes:
    """Bytes of a decode step, from the mixers' state specs.

    Args:
        decoder: the model.
        level: layers converted in every request.
        context: tokens each request has seen.
        batch: requests.
    """
    adapter = sum(p.nbytes for layer in decoder.order[:level] for p in decoder.mixers[layer].parameters())
    states = level * decoder.slot_bytes_moved
    kv = (decoder.n_layers - level) * context * decoder.kv_spec.bytes_per_token
    return StepBytes(decoder.weights.bytes_per_step + adapter, batch * kv, batch * states)
