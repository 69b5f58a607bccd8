"""The policy on bytes, latencies and prompt lengths, a pure function.

Memory: under pressure (memory in use and wanted by the next step above the high-water mark) running requests are converted,
layer by layer, and new ones start higher.

Latency, where there are objectives: while one of them is missed, or bound to be by the prompts that wait, running requests
are converted where that saves a good part of their time, and new ones that it makes that much faster start higher.

After a time in which both are calm (memory below the low-water mark, latencies well within the objectives) new requests
start lower again, down to level 0; several calm times at once lower them as far. Between pressure and calm nothing changes
and no calm time runs, so a load that swings does not make levels swing with it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

from dsla.engine.signals import Decision, Policy, RequestSummary, Signals
from dsla.errors import ConfigError


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the policy.

    Attributes:
        high_water: part of the budget, used or wanted by the next step, above which there is pressure.
        low_water: part of the budget below which the load is calm.
        cooldown_seconds: time between two rounds of conversions, not waited for where the next step would not fit; and
            between two rises of the level of new requests.
        calm_seconds: time below the low-water mark before the level of new requests falls, and between two falls.
        new_level_step: part of all levels by which the level of new requests rises or falls at once.
        long_share: a request whose prompt takes a larger part of the budget than this starts at a level where it does not.
        ttft_seconds: objective for the time to the first token; None = there is none.
        tpot_seconds: objective for the time per output token after the first, likewise. It is watched by its parts, the times
            from one token to the next (`Signals.itl_seconds`), which show while a request still runs.
        latency_low: part of an objective below which a latency is calm.
        latency_gain: part of the time a request takes that converting all its layers must save for it to be converted for
            the sake of an objective: levels cost quality, and a gain within the error of predictions may be none.
        latency_cooldown_seconds: time between two rises for the sake of an objective: what was decided must show first. Of
            latencies, those count that began after the last one.
    """

    high_water: float = 0.9
    low_water: float = 0.7
    cooldown_seconds: float = 0.5
    calm_seconds: float = 5.0
    new_level_step: float = 0.25
    long_share: float = 0.5
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    latency_low: float = 0.7
    latency_gain: float = 0.1
    latency_cooldown_seconds: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.low_water < self.high_water <= 1:
            raise ConfigError(
                "policy needs 0 < low_water < high_water <= 1, "
                f"found low_water={self.low_water}, high_water={self.high_water}"
            )
        for name in ("cooldown_seconds", "calm_seconds", "latency_cooldown_seconds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"policy setting {name} must be >= 0, found {getattr(self, name)}")
        for name in ("ttft_seconds", "tpot_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"policy setting {name} must be a number of seconds > 0, or None, found {value}")
        for name in ("new_level_step", "long_share", "latency_low", "latency_gain"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"policy setting {name} must be in (0, 1], found {getattr(self, name)}")


@dataclass(frozen=True)
class PolicyState:
    """What the policy remembers.

    Attributes:
        raised: when levels last rose for lack of memory, seconds; None = never.
        raised_new: when those of new requests last did.
        calm_since: since when the load has been calm, or when the level of new requests last fell.
        raised_for_latency: when levels last rose for the sake of an objective.
    """

    raised: float | None = None
    raised_new: float | None = None
    calm_since: float | None = None
    raised_for_latency: float | None = None


def make_policy(config: PolicyConfig | None = None) -> Policy:
    """The policy with its settings bound, as the engine takes it."""
    return partial(decide, config=config or PolicyConfig())


def decide(
    state: PolicyState | None, signals: Signals, summaries: Sequence[RequestSummary], now: float, config: PolicyConfig
) -> tuple[PolicyState, list[Decision]]:
    """Levels for this moment.

    Args:
        state: what the last call returned, None at first.
        signals: the load.
        summaries: the running requests.
        now: seconds. A clock that jumps back only makes waiting times start again.
        config: settings.

    Returns:
        The state to hand to the next call, and decisions; no request is named twice.
    """
    state = _without_future(state or PolicyState(), now)
    budget, demand = signals.budget_bytes, signals.used_bytes + signals.wanted_bytes
    latencies = _latencies(signals, config)
    if demand >= config.low_water * budget or any(
        found >= config.latency_low * objective for found, objective in latencies
    ):
        state = replace(state, calm_since=None)
    elif state.calm_since is None and not _within(state.raised_for_latency, config.calm_seconds, now):
        state = replace(state, calm_since=now)

    long = _long_requests(summaries, config.long_share * budget)
    rises = {name: Decision(name, level, "long prompt") for name, level in long.items()}
    others = [summary for summary in summaries if summary.id not in rises]
    step = math.ceil(config.new_level_step * signals.max_level)
    new_level, fast_level = signals.new_level, signals.new_fast_level
    reason = "pressure gone"

    cooling = _within(state.raised, config.cooldown_seconds, now)
    if demand > config.high_water * budget and (demand > budget or not cooling):
        reason = "memory pressure"
        target = (config.high_water + config.low_water) / 2 * budget
        levels = _convert(others, demand - target, lambda summary: summary.saving_per_layer, signals.max_level)
        if new_level < signals.max_level and not _within(state.raised_new, config.cooldown_seconds, now):
            new_level = min(new_level + step, signals.max_level)
            state = replace(state, raised_new=now)
        if levels or new_level != signals.new_level:
            state = replace(state, raised=now)
        rises |= {name: Decision(name, level, reason) for name, level in levels.items()}
    missed = any(found > objective for found, objective in latencies)
    if missed and not _within(state.raised_for_latency, config.latency_cooldown_seconds, now):
        levels = _quicken(others, signals, config, step)
        fast_level = min(fast_level + step, signals.max_level)
        if levels or fast_level != signals.new_fast_level:
            state = replace(state, raised_for_latency=now)
        rises |= {
            name: Decision(name, level, "latency pressure", min_gain=config.latency_gain)
            for name, level in levels.items()
            if name not in rises or level > rises[name].level
        }
    if (new_level or fast_level) and state.calm_since is not None and now - state.calm_since >= config.calm_seconds:
        calm = config.calm_seconds
        falls = int((now - state.calm_since) // calm) if calm else signals.max_level
        new_level, fast_level = (max(level - falls * step, 0) for level in (new_level, fast_level))
        state = replace(state, calm_since=state.calm_since + falls * calm if calm else now)

    decisions = list(rises.values())
    if new_level != signals.new_level:
        decisions.append(Decision(None, new_level, reason))
    if fast_level != signals.new_fast_level:
        raised = fast_level > signals.new_fast_level
        why = "latency pressure" if raised else "pressure gone"
        decisions.append(Decision(None, fast_level, why, min_gain=config.latency_gain))
    return state, decisions


def _without_future(state: PolicyState, now: float) -> PolicyState:
    return PolicyState(*(None if time is None else min(time, now) for time in astuple(state)))


def _within(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since < seconds


def _latencies(signals: Signals, config: PolicyConfig) -> list[tuple[float, float]]:
    """Known latencies that have an objective, each with it."""
    found = (
        (signals.ttft_seconds, config.ttft_seconds),
        (signals.waiting_seconds, config.ttft_seconds),
        (signals.itl_seconds, config.tpot_seconds),
    )
    return [(latency, objective) for latency, objective in found if latency is not None and objective is not None]


def _long_requests(summaries: Sequence[RequestSummary], share_bytes: float) -> dict[str, int]:
    """Levels of requests that have most of their prompt to read, and it takes more than `share_bytes` at their level."""
    levels = {}
    for summary in summaries:
        excess = summary.prompt_bytes - share_bytes
        if summary.computed_tokens <= summary.prompt_tokens_left and excess > 0 and summary.prompt_saving_per_layer > 0:
            level = min(summary.level + math.ceil(excess / summary.prompt_saving_per_layer), summary.max_level)
            if level > summary.level:
                levels[summary.id] = level
    return levels


def _quicken(summaries: Sequence[RequestSummary], signals: Signals, config: PolicyConfig, most: int) -> dict[str, int]:
    """Levels, at most `most` higher, that save the seconds by which objectives are missed, as far as time can be saved."""
    paying = [summary for summary in summaries if _gain(summary) >= config.latency_gain]
    aim = (1 + config.latency_low) / 2
    levels: dict[str, int] = {}
    waiting = max(signals.ttft_seconds or 0.0, signals.waiting_seconds or 0.0)
    for latency, objective, saving in (
        (waiting, config.ttft_seconds, lambda summary: summary.seconds_saved_per_layer),
        (signals.itl_seconds or 0.0, config.tpot_seconds, lambda summary: summary.decode_saving_per_layer),
    ):
        if objective is not None and latency > objective:
            for name, level in _convert(paying, latency - aim * objective, saving, most).items():
                levels[name] = max(level, levels.get(name, 0))
    return levels


def _gain(summary: RequestSummary) -> float:
    """Part of the time its rest takes with full attention that a request saves with all its layers converted."""
    saved = summary.seconds_saved_per_layer * summary.max_level
    return saved / summary.full_seconds if saved > 0 and summary.full_seconds else 0.0


def _convert(
    summaries: Sequence[RequestSummary], excess: float, saving: Callable[[RequestSummary], float], most: int
) -> dict[str, int]:
    """Levels, at most `most` higher, that save `excess` (bytes or seconds), as far as that can be saved.

    Long requests go first, for they save most per layer; but later layers of the order cost more quality, so the next
    layer is always the one that saves most for its place in the order.
    """
    heap = [
        (-saving(summary) / (summary.level + 1), index, summary.level)
        for index, summary in enumerate(summaries)
        if saving(summary) > 0 and summary.level < summary.max_level
    ]
    heapq.heapify(heap)
    levels: dict[str, int] = {}
    while heap and excess > 0:
        _, index, level = heapq.heappop(heap)
        summary = summaries[index]
        excess -= saving(summary)
        levels[summary.id] = level + 1
        if level + 1 < min(summary.max_level, summary.level + most):
            heapq.heappush(heap, (-saving(summary) / (level + 2), index, level + 1))
    return levels
