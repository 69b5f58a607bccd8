"""Settings of the DSLA mixer, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsla.errors import ConfigError
from dsla.mixers.features import FEATURE_MAPS
from dsla.ops import LOG_GATE_FLOOR

_CHOICES = {
    "feature_map": tuple(FEATURE_MAPS),
    "normalizer": ("none", "state", "shared"),
    "gate_source": ("key", "hidden"),
    "gate_shape": ("scalar", "vector"),
    "mixing": ("layer", "head", "query"),
}


@dataclass(frozen=True)
class DslaConfig:
    """How a converted layer mixes tokens. The defaults are the shipped adapter's.

    Attributes:
        n_states: recurrent states a KV head: 1, 2, 4 or 8. State 0 starts as the longest memory (history), the last as the
            shortest (recency).
        feature_map: `identity`, `elu` (elu + 1), `softmax` (over the head dim) or `hedgehog` (softmax over a learned
            projection and its negative, arXiv 2402.04347).
        feature_dim: width F of the features; 0 = the map's natural one (D, hedgehog 2D). Only hedgehog can differ.
        normalizer: `shared` divides window and states by one sum of weights, as softmax attention does; `state` makes each
            part a weighted mean of its own and takes a convex combination; `none` reads the raw states (the paper).
        gate_source: `key` (the cached key; foldable) or `hidden` (the layer's input; the paper).
        gate_shape: one gate per feature (`vector`) or one per KV head and state (`scalar`).
        gate_temperature: gates are `logsigmoid(x) / gate_temperature`.
        log_gate_floor: smallest log gate a token.
        window: latest tokens attended to exactly, 0 = none. States hold only tokens that left the window.
        sinks: first tokens attended to exactly, for ever, and kept out of the states.
        mixing: the parts are weighed per `layer`, per `head`, or per head and `query`.
        delta_rank: rank of the low-rank deltas on the q and o projections, 0 = none.
        rope: whether the mixer sees rotated queries and keys.
    """

    n_states: int = 2
    feature_map: str = "hedgehog"
    feature_dim: int = 0
    normalizer: str = "shared"
    gate_source: str = "key"
    gate_shape: str = "scalar"
    gate_temperature: float = 16.0
    log_gate_floor: float = -1.2
    window: int = 64
    sinks: int = 4
    mixing: str = "query"
    delta_rank: int = 32
    rope: bool = True

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"mixer setting {key!r} must be one of {', '.join(choices)}, found {getattr(self, key)!r}"
                )
        if self.n_states not in (1, 2, 4, 8):
            raise ConfigError(f"mixer setting 'n_states' must be 1, 2, 4 or 8, found {self.n_states}")
        for key in ("window", "sinks", "delta_rank", "feature_dim"):
            if getattr(self, key) < 0:
                raise ConfigError(f"mixer setting {key!r} must be >= 0, found {getattr(self, key)}")
        if not (-math.inf < self.log_gate_floor < 0 and 0 < self.gate_temperature < math.inf):
            raise ConfigError("mixer settings need a finite log_gate_floor < 0 and a finite gate_temperature > 0")
        if self.gate_shape == "vector" and self.log_gate_floor < LOG_GATE_FLOOR:
            raise ConfigError(
                f"mixer setting 'log_gate_floor' must be >= {LOG_GATE_FLOOR} with vector gates, found {self.log_gate_floor}"
            )
        if self.feature_dim and (self.feature_map != "hedgehog" or self.feature_dim % 2):
            raise ConfigError("mixer setting 'feature_dim' must be 0, or even with feature_map 'hedgehog'")
        if self.normalizer == "none" and self.attends_locally:
            raise ConfigError(
                "mixer setting normalizer 'none' has no common scale with window and sinks: set both to 0"
            )
        if self.normalizer != "none" and self.feature_map == "identity":
            raise ConfigError("mixer setting feature_map 'identity' is not positive: use normalizer 'none'")

    @property
    def attends_locally(self) -> bool:
        """Whether some tokens are attended to exactly, beside the states."""
        return self.window > 0 or self.sinks > 0

    @property
    def foldable(self) -> bool:
        """Whether a KV cache alone holds all the states are made of."""
        return self.gate_source == "key" and self.rope

    def feature_width(self, head_dim: int) -> int:
        """Width F of the features for heads of `head_dim`."""
        natural = 2 * head_dim if self.feature_map == "hedgehog" else head_dim
        return self.feature_dim or natural
