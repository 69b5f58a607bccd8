"""The policy on bytes and prompt lengths, a pure function.

Under pressure (memory in use and wanted by the next step above the high-water mark) running requests are converted, layer
by layer, and new ones start higher; after a calm time below the low-water mark new requests start lower again, down to
level 0; several calm times at once lower them as far. Between the marks nothing changes and no calm time runs, so a load
that swings does not make levels swing with it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from dsla.engine.signals import Decision, Policy, RequestSummary, Signals
from dsla.errors import ConfigError


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the policy.

    Attributes:
        high_water: part of the budget, used or wanted by the next step, above which there is pressure.
        low_water: part of the budget below which the load is calm.
        cooldown_seconds: time between two rounds of conversions, and between two rises of the level of new requests; not
            waited for where the next step would not fit.
        calm_seconds: time below the low-water mark before the level of new requests falls, and between two falls.
        new_level_step: part of all levels by which the level of new requests rises or falls at once.
        long_share: a request whose prompt takes a larger part of the budget than this starts at a level where it does not.
    """

    high_water: float = 0.9
    low_water: float = 0.7
    cooldown_seconds: float = 0.5
    calm_seconds: float = 5.0
    new_level_step: float = 0.25
    long_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.low_water < self.high_water <= 1:
            raise ConfigError(
                "policy needs 0 < low_water < high_water <= 1, "
                f"found low_water={self.low_water}, high_water={self.high_water}"
            )
        for name in ("cooldown_seconds", "calm_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy setting {name} must be >= 0, found {getattr(self, name)}")
        for name in ("new_level_step", "long_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"policy setting {name} must be in (0, 1], found {getattr(self, name)}")


@dataclass(frozen=True)
class PolicyState:
    """What the policy remembers.

    Attributes:
        raised: when levels last rose, seconds; None = never.
        calm_since: since when the load has been below the low-water mark, or when the level of new requests last fell.
    """

    raised: float | None = None
    calm_since: float | None = None


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
    demand = signals.used_bytes + signals.wanted_bytes
    if demand >= config.low_water * signals.budget_bytes:
        state = replace(state, calm_since=None)
    elif state.calm_since is None:
        state = replace(state, calm_since=now)

    levels = _long_requests(summaries, config.long_share * signals.budget_bytes)
    decisions = [Decision(name, level, "long prompt") for name, level in levels.items()]
    step = math.ceil(config.new_level_step * signals.max_level)
    if demand > config.high_water * signals.budget_bytes:
        cooling = state.raised is not None and now - state.raised < config.cooldown_seconds
        if cooling and demand <= signals.budget_bytes:
            return state, decisions
        target = (config.high_water + config.low_water) / 2 * signals.budget_bytes
        others = [summary for summary in summaries if summary.id not in levels]
        rises = _convert(others, demand - target)
        decisions += [Decision(name, level, "memory pressure") for name, level in rises.items()]
        new_level = min(signals.new_level + step, signals.max_level)
        if new_level != signals.new_level:
            decisions.append(Decision(None, new_level, "memory pressure"))
        if rises or new_level != signals.new_level:
            state = replace(state, raised=now)
    elif signals.new_level and state.calm_since is not None and now - state.calm_since >= config.calm_seconds:
        calm = config.calm_seconds
        falls = int((now - state.calm_since) // calm) if calm else signals.max_level
        decisions.append(Decision(None, max(signals.new_level - falls * step, 0), "pressure gone"))
        state = replace(state, calm_since=state.calm_since + falls * calm if calm else now)
    return state, decisions


def _without_future(state: PolicyState, now: float) -> PolicyState:
    raised, calm = state.raised, state.calm_since
    return replace(
        state, raised=None if raised is None else min(raised, now), calm_since=None if calm is None else min(calm, now)
    )


def _long_requests(summaries: Sequence[RequestSummary], share_bytes: float) -> dict[str, int]:
    """Levels of requests that have not begun and whose prompts take more than `share_bytes` at the level they have."""
    levels = {}
    for summary in summaries:
        excess = summary.prompt_bytes - share_bytes
        if summary.computed_tokens == 0 and excess > 0 and summary.prompt_saving_per_layer > 0:
            level = min(summary.level + math.ceil(excess / summary.prompt_saving_per_layer), summary.max_level)
            if level > summary.level:
                levels[summary.id] = level
    return levels


def _convert(summaries: Sequence[RequestSummary], excess: float) -> dict[str, int]:
    """Levels that free `excess` bytes, as far as they can be freed.

    Long requests go first, for they free most per layer; but later layers of the order cost more quality, so the next
    layer is always the one that frees most bytes for its place in the order.
    """
    heap = [
        (-summary.saving_per_layer / (summary.level + 1), index, summary.level)
        for index, summary in enumerate(summaries)
        if summary.saving_per_layer > 0 and summary.level < summary.max_level
    ]
    heapq.heapify(heap)
    levels: dict[str, int] = {}
    while heap and excess > 0:
        _, index, level = heapq.heappop(heap)
        summary = summaries[index]
        excess -= summary.saving_per_layer
        levels[summary.id] = level + 1
        if level + 1 < summary.max_level:
            heapq.heappush(heap, (-summary.saving_per_layer / (level + 2), index, level + 1))
    return levels
