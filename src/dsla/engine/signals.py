"""The words between the engine and a policy: what a policy sees, and what it may decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signals:
    """Load at a step boundary.

    Attributes:
        budget_bytes: bytes of the arena.
        kv_bytes: bytes of KV pages in use.
        state_bytes: bytes of state slots in use.
        wanted_bytes: bytes the next step takes beside those in use, at the levels of now. Prompts that are read later do
            not count: they take nothing yet, and layers converted for them would be converted too early.
        new_level: level new requests start at now.
        max_level: highest level of the model.
        cached_bytes: bytes that hold nothing but prefixes for later requests and are given up where others want them; they
            are not among those in use.
        queue_length: requests that have not started.
        waiting_tokens: prompt tokens that are not computed yet, of queued and of running requests.
        waiting_seconds: time they take, as predicted, at the levels they have or would start at now; None = unknown.
        ttft_seconds: recent times to first token (a high quantile over the last seconds) of requests that came since levels
            were last changed for the sake of latencies; None = none was seen.
        itl_seconds: recent times from one token of a request to its next, likewise of those that began since.
        new_fast_level: level new requests start at now if that makes them faster.
    """

    budget_bytes: int
    kv_bytes: int
    state_bytes: int
    wanted_bytes: int
    new_level: int
    max_level: int
    cached_bytes: int = 0
    queue_length: int = 0
    waiting_tokens: int = 0
    waiting_seconds: float | None = None
    ttft_seconds: float | None = None
    itl_seconds: float | None = None
    new_fast_level: int = 0

    @property
    def used_bytes(self) -> int:
        """Bytes in use."""
        return self.kv_bytes + self.state_bytes


@dataclass(frozen=True)
class RequestSummary:
    """A running request at a step boundary.

    Attributes:
        id: the request.
        level: its level.
        max_level: level it may be raised to.
        computed_tokens: tokens it remembers.
        saving_per_layer: bytes freed now by converting one more layer; negative below the break-even length, 0 while
            nothing is computed.
        prompt_bytes: bytes its prompt takes at its level, once read.
        prompt_saving_per_layer: bytes one more converted layer saves of them; negative below the break-even length.
        prompt_tokens_left: tokens of its prompt that are not computed yet.
        new_tokens_left: tokens it is expected to generate yet.
        decode_saving_per_layer: seconds one more converted layer saves of each of those; negative where it costs time.
        prefill_saving_per_layer: seconds one more converted layer saves of the rest of its prompt; negative likewise.
        fold_seconds_per_layer: time it takes to convert one more layer.
        full_seconds: time the rest of it would take with full attention.
    """

    id: str
    level: int
    max_level: int
    computed_tokens: int
    saving_per_layer: int
    prompt_bytes: int
    prompt_saving_per_layer: int
    prompt_tokens_left: int = 0
    new_tokens_left: int = 1
    decode_saving_per_layer: float = 0.0
    prefill_saving_per_layer: float = 0.0
    fold_seconds_per_layer: float = 0.0
    full_seconds: float = 0.0

    @property
    def seconds_saved_per_layer(self) -> float:
        """Seconds one more converted layer saves over the rest of the request; negative where it costs time."""
        decoding = self.new_tokens_left * self.decode_saving_per_layer
        return self.prefill_saving_per_layer + decoding - self.fold_seconds_per_layer


@dataclass(frozen=True)
class Decision:
    """A level for a running request, or (`request_id` None) for requests that start from now on.

    Attributes:
        request_id: the request, or None.
        level: its new level. Running requests are never lowered.
        reason: one word or two, for the event log.
        min_gain: None = it is for the sake of memory, and of new requests holds where it saves that (`Signals.new_level`); else
            for the sake of latency, and holds where all layers converted would save at least this part of their time
            (`Signals.new_fast_level`).
    """

    request_id: str | None
    level: int
    reason: str
    min_gain: float | None = None


Policy = Callable[[Any, Signals, Sequence[RequestSummary], float], tuple[Any, list[Decision]]]
"""`(state, signals, summaries, now) -> (state, decisions)`; the first state is None, `now` is in seconds."""


def start_level(new_level: int, new_fast_level: int, saves_memory: bool, saves_time: bool) -> int:
    """Level a new request starts at under a policy, before its own bounds.

    Args:
        new_level: level of new requests that save memory by it.
        new_fast_level: level of new requests that save time by it.
        saves_memory: whether converted layers save memory of the request in the end.
        saves_time: whether they save enough of its time.

    Returns:
        The higher of the levels that pay, 0 if none does: a short request keeps full attention.
    """
    return max(new_level if saves_memory else 0, new_fast_level if saves_time else 0)
