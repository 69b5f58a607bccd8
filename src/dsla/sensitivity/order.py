"""From scores to a plan, and to a picture of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dsla.convert.plan import Plan, Teacher
from dsla.mixers import DslaConfig
from dsla.sensitivity.metrics import METRICS


def make_plan(
    model: Any,
    teacher: Teacher,
    tokens: Tensor,
    mixer: DslaConfig,
    metric: str = "kl",
    on_progress: Callable[[str, int, int], None] = lambda metric, done, total: None,
) -> Plan:
    """Scores every layer by every metric and orders them by one.

    Args:
        model: the teacher as a Hugging Face model.
        teacher: its name, hash and number of layers.
        tokens: windows of text `[n, T]`.
        mixer: settings of the converted layers.
        metric: the metric that orders, a key of `METRICS`.
        on_progress: called with (metric, layers done, layers in all).

    Returns:
        A plan over all layers.
    """
    scores = {}
    for name, score in METRICS.items():
        scores[name] = tuple(score(model, tokens, mixer, lambda done, total, name=name: on_progress(name, done, total)))  # type: ignore[misc]
    order = sorted(range(teacher.n_layers), key=lambda layer: scores[metric][layer])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Plan(teacher, tuple(order), mixer, metric, scores, versions)


def plot_scores(plan: Plan, path: Path) -> None:
    """Draws every metric over the layers, bars coloured by place in the order.

    Args:
        plan: a plan with scores.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(plan.scores), 1, figsize=(9, 2.6 * len(plan.scores)), layout="constrained", squeeze=False
    )
    place = {layer: rank / max(len(plan.order) - 1, 1) for rank, layer in enumerate(plan.order)}
    labels = {"kl": "KL, converted alone (nats)", "entropy": "attention entropy (nats)"}
    for axis, (metric, scores) in zip(axes[:, 0], plan.scores.items(), strict=True):
        axis.bar(range(len(scores)), scores, color=[pyplot.cm.viridis(place[layer]) for layer in range(len(scores))])
        axis.set_ylabel(labels.get(metric, metric))
        if min(scores) > 0 and max(scores) > 30 * min(scores):
            axis.set_yscale("log")
        axis.set_xticks(range(len(scores)))
        axis.tick_params(labelsize=7)
    axes[0, 0].set_title(f"{plan.teacher.name}: sensitivity of the layers (dark = converted first, by {plan.metric})")
    axes[-1, 0].set_xlabel("layer")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
