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
    """

    budget_bytes: int
    kv_bytes: int
    state_bytes: int
    wanted_bytes: int
    new_level: int
    max_level: int

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
    """

    id: str
    level: int
    max_level: int
    computed_tokens: int
    saving_per_layer: int
    prompt_bytes: int
    prompt_saving_per_layer: int


@dataclass(frozen=True)
class Decision:
    """A level for a running request, or (`request_id` None) for requests that start from now on.

    Attributes:
        request_id: the request, or None.
        level: its new level. Running requests are never lowered.
        reason: one word or two, for the event log.
    """

    request_id: str | None
    level: int
    reason: str


Policy = Callable[[Any, Signals, Sequence[RequestSummary], float], tuple[Any, list[Decision]]]
"""`(state, signals, summaries, now) -> (state, decisions)`; the first state is None, `now` is in seconds."""
