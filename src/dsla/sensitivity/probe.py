"""What metrics share: what they may look at, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity.journal import Journal

OnProgress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""


@dataclass(frozen=True)
class Probe:
    """What a metric may look at.

    Attributes:
        model: the teacher, a Hugging Face causal language model of a supported family; metrics leave it as it was.
        tokens: windows of text `[n, T]` int64.
        config: settings of the converted layers.
        trained: a trained mixer for every layer. Default: none, layers are converted to window and sinks alone.
        seed: of needles and of the random order.
        candidates: layers the greedy search tries for each place.
        journal: what was measured before.
    """

    model: Any
    tokens: Tensor
    config: DslaConfig
    trained: Mapping[int, DslaMixer] | None = None
    seed: int = 0
    candidates: int = 4
    journal: Journal = field(default_factory=Journal)


@dataclass(frozen=True)
class Ranking:
    """What a metric answers.

    Attributes:
        order: the layers, least sensitive first.
        scores: a score for each layer, low = convert first.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]


def by_score(scores: Sequence[float]) -> Ranking:
    """The layers in order of their scores; of equal ones, the lower layer comes first."""
    return Ranking(tuple(sorted(range(len(scores)), key=lambda layer: scores[layer])), tuple(scores))
