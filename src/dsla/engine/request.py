"""A request on its way through the engine, and what a step says about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from dsla.engine.history import History, before, extended, level_at
from dsla.engine.logit_edits import LogitEdits
from dsla.engine.memory import Parked, RequestMemory
from dsla.engine.sampling import SamplingParams, TokenLogprobs

_SHORTEST = 16


class Status(Enum):
    """Where a request is: `WAITING` in the queue, `RUNNING` with memory of its own, `FINISHED` with none."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Goal:
    """A level that a running request is to reach, and why."""

    level: int
    reason: str


@dataclass(eq=False)
class Request:
    """Prompt, wishes, and progress of one request, which equals no other.

    Attributes:
        id: its name, unique among open requests.
        prompt: token ids.
        params: sampling.
        max_tokens: tokens to generate at most.
        seed: of its sampling.
        min_level: level it starts at, at least.
        max_level: level it is never raised above.
        end_tokens: token ids that end it.
        message_ends: tokens of the prompt after which some of its messages end, and what it remembers may be of use to others.
        sibling_of: id of a request with the same prompt, whose computed prompt it starts with; or None.
        arrival: place in the order of acceptance.
        accepted_at: when that was, seconds.
        started_at: when it started first, or None.
        first_token_at: when it got its first token, or None.
        last_token_at: when it got its latest token, or None.
        level: layers converted now.
        ceiling: level its admission counted on being allowed, `level ... max_level`.
        goal: level it is on its way to, or None.
        levels: level history, `(from_token, level)`: tokens from position `from_token` on were computed at `level`.
        computed: tokens of prompt and output whose keys and values (or states) exist.
        replay_until: tokens whose levels the history states already: they had been computed before it was preempted.
        cached_tokens: tokens of the prompt that another request had computed when it started first.
        output: generated token ids.
        folded_tokens: cached tokens turned into states, summed over layers.
        deferred: whether the log says that its goal must wait.
        edits: what changes its logits, once it has had any; never shared.
        memory: what it remembers, while running.
        parked: what it remembers, while it waits outside the arena.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    min_level: int
    max_level: int
    end_tokens: frozenset[int] = frozenset()
    message_ends: tuple[int, ...] = ()
    sibling_of: str | None = None
    arrival: int = 0
    accepted_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    level: int = 0
    ceiling: int = 0
    goal: Goal | None = None
    levels: History = field(default_factory=list)
    computed: int = 0
    replay_until: int = 0
    cached_tokens: int = 0
    output: list[int] = field(default_factory=list)
    folded_tokens: int = 0
    deferred: bool = False
    status: Status = Status.WAITING
    edits: LogitEdits | None = None
    memory: RequestMemory | None = None
    parked: Parked | None = None

    def is_like(self, other: Request) -> bool:
        """Whether both have the same prompt and may have the same levels, so that one prompt computed serves both."""
        mine, theirs = ((r.prompt, r.min_level, r.max_level) for r in (self, other))
        return mine == theirs

    @property
    def pending(self) -> int:
        """Tokens known but not computed: the rest of the prompt, or the last output token."""
        return len(self.prompt) + len(self.output) - self.computed

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not computed."""
        return max(len(self.prompt) - self.computed, 0)

    @property
    def final_tokens(self) -> int:
        """Tokens it remembers at most; the last output token is never computed."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and output `[n]`, int64."""
        return np.array(self.prompt + self.output, dtype=np.int64)

    @property
    def replaying(self) -> bool:
        """Whether its levels are those of its history, and nothing else may change them."""
        return self.computed < self.replay_until or (bool(self.levels) and self.levels[-1][1] > self.level)

    @property
    def history(self) -> History:
        """Level history of what it remembers now: while it replays, the part that has been done again."""
        return extended(before(self.levels, self.computed), self.computed, self.level)

    @property
    def replayed_level(self) -> int:
        """The level its history states for the next token, while it replays."""
        return level_at(self.levels, self.computed)

    def tokens_before_pause(self) -> int:
        """Tokens that may be computed in one go.

        After them its history states another level, or, where it has layers converted, a message ends: states cannot be cut
        back, so that others can begin there only with a copy of them. All that are pending, if neither comes. An end that
        comes soon after what it began with is not worth a step of its own.
        """
        pauses = [start for start, _ in self.levels if start > self.computed]
        if self.level and not self.replaying:
            first = max(self.computed + 1, self.cached_tokens + _SHORTEST)
            pauses += [end for end in self.message_ends if end >= first]
        return min(pauses, default=self.computed + self.pending) - self.computed

    def forget_progress(self) -> None:
        """Has nothing computed any more: what its output followed from must be replayed, all else begins anew."""
        self.goal = None
        if self.output:
            self.replay_until = max(self.replay_until, self.computed)
        else:
            self.levels, self.folded_tokens, self.replay_until, self.ceiling = [], 0, 0, 0
        self.computed = self.level = 0

    def next_tokens(self, count: int) -> list[int]:
        """The next `count` tokens to compute."""
        start, known = self.computed, len(self.prompt)
        if start >= known:
            return self.output[start - known : start - known + count]
        return (self.prompt[start : start + count] + self.output)[:count]

    def enter_level(self, level: int) -> None:
        """Computes all further tokens at `level`, and writes that into the history, unless it replays."""
        if not self.replaying:
            self.levels = extended(self.levels, self.computed, level)
        self.level = level
        self.ceiling = max(self.ceiling, level)


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
        cached_tokens: tokens of the prompt that an earlier request had computed.
        logprobs: of each of `tokens`, its own `(token, logprob)` and those of the most likely tokens; None = not asked for.
    """

    request_id: str
    tokens: list[int]
    finish_reason: str | None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    levels: list[list[int]]
    folded_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def joined(self, later: StepOutput) -> StepOutput:
        """What this step and a later one did for the request, as if they were one."""
        logprobs = None if self.logprobs is None or later.logprobs is None else self.logprobs + later.logprobs
        return replace(later, tokens=self.tokens + later.tokens, logprobs=logprobs)

    @classmethod
    def of(
        cls,
        request: Request,
        tokens: list[int],
        finish_reason: str | None = None,
        error: str | None = None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
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
            cached_tokens=request.cached_tokens,
            logprobs=logprobs,
        )
