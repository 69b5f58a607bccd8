"""How much a step may do: its time is bounded, so that whoever waits for a next token waits no longer."""

from __future__ import annotations

from collections.abc import Callable

from dsla.engine.cost import Correction, CostModel, StepWork

LEAST_CHUNK = 16
"""Tokens of prompts that are read even where decodes alone take a step's time: they have to go on."""


class Pace:
    """The time of one step, shared out: conversions get half of it, prompts what they and the decodes leave.

    Args:
        clock: seconds.
        seconds: of a step, at most, as far as there is a choice; None = no bound.
        cost: what a step takes; None = chunks of prompts are not bounded by time.

    Attributes:
        clock: as given.
        cost: as given.
    """

    def __init__(self, clock: Callable[[], float], seconds: float | None, cost: CostModel | None) -> None:
        self.clock, self._seconds, self.cost = clock, seconds, cost
        self._correction = Correction()
        self.begin()

    @property
    def ratio(self) -> float:
        """How many times longer steps take now than was measured: other programs use the machine too."""
        return self._correction.ratio

    def begin(self) -> None:
        """A step begins."""
        self._start = self._last = self.clock()
        self._longest = 0.0

    @property
    def spent(self) -> float:
        """Seconds of this step that have gone to conversions."""
        return self._last - self._start

    def converts(self) -> bool:
        """Whether another layer may be converted in this step, taken to last as long as the longest so far."""
        return self._seconds is None or self.spent + self._longest <= self._seconds / 2

    def converted(self) -> None:
        """A layer has been converted."""
        now = self.clock()
        self._longest = max(self._longest, now - self._last)
        self._last = now

    def chunk(self, limit: int, prior: int, kept: int, converted: int, beside: StepWork) -> int:
        """The longest chunk of a prompt that leaves the step in time.

        Args:
            limit: its tokens at most.
            prior: tokens the request has seen before.
            kept: layers with full attention.
            converted: layers that are converted.
            beside: what the step computes besides.
        """
        if self._seconds is None or self.cost is None:
            return limit
        left = (self._seconds - self.spent) / self._correction.ratio
        count = self.cost.prefill_tokens_within(left, limit, prior, kept, converted, beside)
        return max(count, min(LEAST_CHUNK - beside.prefill_tokens, limit))

    def end(self, work: StepWork, start: float) -> None:
        """A step has computed `work` since `start`; how long that took makes the next prediction better."""
        if self.cost is not None:
            self._correction = self._correction.after(self.cost.step_seconds(work), self.clock() - start)
