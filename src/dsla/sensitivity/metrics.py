"""The metrics by which layers can be ordered; a low score means: convert this one first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dsla.sensitivity.attention import attention_entropy, retrieval_score
from dsla.sensitivity.measured import greedy_kl, mean_and_worst, measured_kl
from dsla.sensitivity.outliers import outlier_ratio
from dsla.sensitivity.probe import OnProgress, Probe, Ranking, by_score

_TRAINED = "_trained"


@dataclass(frozen=True)
class Metric:
    """A way to order layers.

    Attributes:
        rank: measures it.
        label: what its scores are, with their unit.
        cheap: whether it costs about as much as the teacher's reading the text once; such scores are in every plan.
        converts: whether it converts layers, and so has a second form with trained mixers.
    """

    rank: Callable[[Probe, OnProgress], Ranking]
    label: str
    cheap: bool = False
    converts: bool = False


def random_order(probe: Probe, on_progress: OnProgress) -> Ranking:
    """An order that knows nothing of the model, to compare others with; the seed decides."""
    generator = torch.Generator().manual_seed(probe.seed)
    return by_score(torch.rand(probe.model.config.num_hidden_layers, generator=generator).tolist())


METRICS = {
    "kl": Metric(measured_kl, "KL, converted alone (nats)", converts=True),
    "kl_worst": Metric(
        partial(measured_kl, summary=mean_and_worst), "KL, converted alone, mean + worst window (nats)", converts=True
    ),
    "greedy": Metric(greedy_kl, "KL, converted with all before it (nats)", converts=True),
    "greedy_worst": Metric(
        partial(greedy_kl, summary=mean_and_worst), "KL, with all before it, mean + worst window (nats)", converts=True
    ),
    "entropy": Metric(attention_entropy, "attention entropy (nats)", cheap=True),
    "outliers": Metric(outlier_ratio, "outliers among the attention weights (share)", cheap=True),
    "retrieval": Metric(retrieval_score, "attention that copies a needle (heads)", cheap=True),
    "random": Metric(random_order, "random"),
}


def recorded_name(metric: str, trained: bool) -> str:
    """The name a metric has in a plan: whether mixers were trained is part of it."""
    return metric + _TRAINED if trained and METRICS[metric].converts else metric


def label(recorded: str) -> str:
    """What the scores of a metric in a plan are; the name itself, of one that this version does not know."""
    name = recorded.removesuffix(_TRAINED)
    if name not in METRICS:
        return recorded
    return METRICS[name].label + (", trained" if recorded != name else "")
