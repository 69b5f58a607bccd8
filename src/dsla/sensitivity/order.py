"""From scores to a plan, and to a picture of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dsla.convert.plan import Plan, Teacher
from dsla.distill.recipe import OrderSettings
from dsla.errors import ConfigError
from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity.journal import Journal
from dsla.sensitivity.metrics import METRICS, label, recorded_name
from dsla.sensitivity.probe import Probe

_ROOM = 8


def make_plan(
    model: Any,
    teacher: Teacher,
    tokens: Tensor,
    mixer: DslaConfig,
    settings: OrderSettings,
    trained: Mapping[int, DslaMixer] | None = None,
    seed: int = 0,
    progress: Path | None = None,
    on_progress: Callable[[str, int, int], None] = lambda metric, done, total: None,
    on_measured: Callable[[int], None] = lambda known: None,
) -> Plan:
    """Orders the layers by one metric, and records the scores of the cheap ones and of those that are asked for.

    Args:
        model: the teacher as a Hugging Face model.
        teacher: its name, hash and number of layers.
        tokens: windows of text `[n, T]`.
        mixer: settings of the converted layers.
        settings: the metric that orders, the others to record, and how wide the greedy search is.
        trained: a trained mixer for every layer; metrics that convert layers then use them, and say so in their name.
        seed: of what is random.
        progress: folder in which an interrupted search is found again. Default: it is not.
        on_progress: called with (metric, parts done, parts in all).
        on_measured: called with the number of measured divergences after each new one, when it is in `progress`.

    Returns:
        A plan over all layers.

    Raises:
        ConfigError: if windows are too short to reach beyond the mixer's window and sinks, or mixers are missing.
        DataError: if nothing can be retrieved from the text.
        ModelError: if a converted model's predictions are not finite.
        PlanError: if `progress` cannot be read or written.
    """
    needed = mixer.window + mixer.sinks + _ROOM
    if tokens.shape[1] < needed:
        raise ConfigError(
            f"recipe.order.seq_len is {tokens.shape[1]}: with a window of {mixer.window} and {mixer.sinks} sinks nothing lies "
            f"beyond them, and no layer would differ from another; it must be at least {needed}"
        )
    missing = sorted(set(range(teacher.n_layers)) - set(trained)) if trained is not None else []
    if missing:
        raise ConfigError(f"layer {missing[0]} has no trained mixer: finish the conversion first")
    name = f"order-{_fingerprint(teacher, tokens, mixer, trained)}.json"
    journal = Journal(progress / name if progress else None, on_measured)
    probe = Probe(model, tokens, mixer, trained, seed, settings.candidates, journal)
    asked = {settings.metric, *settings.also}
    rankings = {
        recorded_name(name, trained is not None): metric.rank(
            probe,
            lambda done, total, name=name: on_progress(name, done, total),  # type: ignore[misc]
        )
        for name, metric in METRICS.items()
        if metric.cheap or name in asked
    }
    metric = recorded_name(settings.metric, trained is not None)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    scores = {name: ranking.scores for name, ranking in rankings.items()}
    return Plan(teacher, rankings[metric].order, mixer, metric, scores, versions)


def _fingerprint(teacher: Teacher, tokens: Tensor, mixer: DslaConfig, trained: Mapping[int, DslaMixer] | None) -> str:
    """Names all a measured KL depends on."""
    digest = hashlib.sha256(f"{teacher.sha256}, by window".encode())
    digest.update(json.dumps(dataclasses.asdict(mixer)).encode())
    digest.update(json.dumps(tokens.tolist()).encode())
    for layer, trained_mixer in sorted((trained or {}).items()):
        digest.update(str(layer).encode())
        for weight in trained_mixer.state_dict().values():
            digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
    for axis, (metric, scores) in zip(axes[:, 0], plan.scores.items(), strict=True):
        axis.bar(range(len(scores)), scores, color=[pyplot.cm.viridis(place[layer]) for layer in range(len(scores))])
        axis.set_ylabel(label(metric).replace(" (", "\n("), fontsize=8)
        if min(scores) > 0 and max(scores) > 30 * min(scores):
            axis.set_yscale("log")
        axis.set_xticks(range(len(scores)))
        axis.tick_params(labelsize=7)
    axes[0, 0].set_title(f"{plan.teacher.name}: sensitivity of the layers (dark = converted first, by {plan.metric})")
    axes[-1, 0].set_xlabel("layer")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
