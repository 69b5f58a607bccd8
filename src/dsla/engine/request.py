"""A request on its way through the engine, and what a step says about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dsla.engine.memory import RequestMemory
from dsla.engine.sampling import SamplingParams


class Status(Enum):
    """Where a request is: `WAITING` in the queue, `RUNNING` with memory of its own, `FINISHED` with none."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class Request:
    """Prompt, wishes, and progress of one request.

    Attributes:
        id: its name, unique among open requests.
        prompt: token ids.
        params: sampling.
        max_tokens: tokens to generate at most.
        seed: of its sampling.
        min_level: level it starts at, at least.
        max_level: level it is never raised above.
        level: layers converted now.
        ceiling: level its admission counted on being allowed, `level ... max_level`.
        levels: level history, `(from_token, level)`: tokens from position `from_token` on were computed at `level`.
        computed: tokens of prompt and output whose keys and values (or states) exist.
        output: generated token ids.
        folded_tokens: cached tokens turned into states, summed over layers.
        memory: what it remembers, while running.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    min_level: int
    max_level: int
    level: int = 0
    ceiling: int = 0
    levels: list[tuple[int, int]] = field(default_factory=list)
    computed: int = 0
    output: list[int] = field(default_factory=list)
    folded_tokens: int = 0
    status: Status = Status.WAITING
    memory: RequestMemory | None = None

    @property
    def pending(self) -> int:
        """Tokens known but not computed: the rest of the prompt, or the last output token."""
        return len(self.prompt) + len(self.output) - self.computed

    @property
    def final_tokens(self) -> int:
        """Tokens it remembers at most; the last output token is never computed."""
        return len(self.prompt) + self.max_tokens - 1

    def next_tokens(self, count: int) -> list[int]:
        """The next `count` tokens to compute."""
        start, known = self.computed, len(self.prompt)
        if start >= known:
            return self.output[start - known : start - known + count]
        return (self.prompt[start : start + count] + self.output)[:count]

    def enter_level(self, level: int) -> None:
        """Computes all further tokens at `level`; writes the history, one entry for all changes at one token."""
        self.level = level
        self.ceiling = max(self.ceiling, level)
        if self.levels and self.levels[-1][0] == self.computed:
            self.levels.pop()
        if not self.levels or self.levels[-1][1] != level:
            self.levels.append((self.computed, level))


@dataclass(frozen=True)
class StepOutput:
    """What one step did for one request.

    Attributes:
        request_id: the request.
        tokens: new token ids, without the one that ended it.
        finish_reason: None while it runs, else `stop`, `length`, `abort` or `error`.
        error: what went wrong, with `error`.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated so far.
        levels: its level history so far, `[[from_token, level], ...]`.
        folded_tokens: cached tokens turned into states so far, summed over layers.
    """

    request_id: str
    tokens: list[int]
    finish_reason: str | None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    levels: list[list[int]]
    folded_tokens: int

    @classmethod
    def of(
        cls, request: Request, tokens: list[int], finish_reason: str | None = None, error: str | None = None
    ) -> StepOutput:
        """The output of a step for `request`, with its counters as they are now."""
        return cls(
            request_id=request.id,
            tokens=tokens,
            finish_reason=finish_reason,
            error=error,
            prompt_tokens=len(request.prompt),
            completion_tokens=len(request.output),
            levels=[list(entry) for entry in request.levels],
            folded_tokens=request.folded_tokens,
        )
