"""Metrics that convert layers and measure how far the model's predictions move: one layer alone, or one after the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dsla.convert.adapter import cast
from dsla.convert.surgery import ConvertedAttention
from dsla.distill.activations import Activations
from dsla.distill.logits import teacher_kl
from dsla.errors import ModelError
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity.probe import OnProgress, Probe, Ranking, by_score

STRIDE = 8

Summary = Callable[[Sequence[float]], float]
"""What is taken of the KL of several windows."""


def mean(kls: Sequence[float]) -> float:
    """What a conversion costs on average."""
    return sum(kls) / len(kls)


def mean_and_worst(kls: Sequence[float]) -> float:
    """What it costs on average, and what it costs the text that minds it most: no kind of text is given up for others."""
    return mean(kls) + max(kls)


def measured_kl(probe: Probe, on_progress: OnProgress, summary: Summary = mean) -> Ranking:
    """KL(teacher || teacher with one layer converted) of the next-token distributions in nats, for each layer in turn.

    Without trained mixers the converted layer is window and sinks alone. It so measures what the layer reads from beyond
    them, and needs no training.

    Args:
        probe: model, text and mixers.
        on_progress: called after each layer.
        summary: the score of a layer, from its KL in each window.
    """
    with Trial(probe) as trial:
        scores = []
        for layer in range(trial.n_layers):
            scores.append(summary(trial.kls_with(layer)))
            on_progress(layer + 1, trial.n_layers)
    return by_score(scores)


def greedy_kl(probe: Probe, on_progress: OnProgress, summary: Summary = mean) -> Ranking:
    """Converts the layers one after the other, always the one after which KL(teacher || model) is least.

    The first place is given after a trial of every layer, each further one after a trial of the `candidates` layers that
    added least when they were last tried. A layer's score is the KL in nats once it and all before it in the order are
    converted, so scores nearly always rise along the order; where a conversion happens to help, the order still holds.
    Arguments as `measured_kl`; the KL is what `summary` makes of it.
    """
    with Trial(probe) as trial:
        left, order, scores = set(range(trial.n_layers)), list[int](), [0.0] * trial.n_layers
        tried, added, reached = [trial.n_layers], dict[int, float](), 0.0
        tried += [min(probe.candidates, places) for places in range(trial.n_layers - 1, 0, -1)]
        done = 0
        while left:
            some = sorted(left, key=lambda layer: (added.get(layer, 0.0), layer))[: tried[len(order)]]
            found = {}
            # From low layers to high ones, the inputs of each are a start for the next.
            for layer in sorted(some):
                found[layer] = summary(trial.kls_with(layer))
                added[layer] = found[layer] - reached
                done += 1
                on_progress(done, sum(tried))
            best = min(found, key=lambda layer: (found[layer], layer))
            reached = scores[best] = found[best]
            order.append(best)
            left.remove(best)
            trial.convert(best, left)
    return Ranking(tuple(order), tuple(scores))


class Trial:
    """The teacher with some layers converted; the teacher again when it is left.

    Args:
        probe: model, text and mixers.

    Attributes:
        n_layers: layers of the model.
    """

    @torch.no_grad()
    def __init__(self, probe: Probe) -> None:
        model, family = probe.model, family_of(probe.model.config)
        self._activations = Activations(model, probe.tokens.split(1))
        self._trunk, self._name = self._activations.trunk, family.attention
        self._layers, self._journal = self._trunk.layers, probe.journal
        self.n_layers = len(self._layers)
        self._softmax = [getattr(layer, family.attention) for layer in self._layers]
        mixers = [floor_mixer(probe)] * self.n_layers
        if probe.trained is not None:
            mixers = [probe.trained[layer] for layer in range(self.n_layers)]
        self._dsla = [
            ConvertedAttention(softmax, mixer, family) for softmax, mixer in zip(self._softmax, mixers, strict=True)
        ]
        self._converted: list[int] = []
        self._teacher = [self._predictions(x, self.n_layers) for x in self._activations.at(self.n_layers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for layer, softmax in zip(self._layers, self._softmax, strict=True):
            setattr(layer, self._name, softmax)

    @torch.no_grad()
    def kls_with(self, layer: int) -> tuple[float, ...]:
        """KL in nats of each window with one more layer converted, for the moment.

        Raises:
            ModelError: if it is not finite.
        """
        converted = (*self._converted, layer)
        kls = self._journal.find(converted)
        if kls is None:
            inputs = self._activations.at(layer)
            with self._conversion(layer):
                kls = tuple(
                    float(teacher_kl(self._predictions(x, layer), expected, self._trunk.head))
                    for x, expected in zip(inputs, self._teacher, strict=True)
                )
            if not all(map(math.isfinite, kls)):
                raise ModelError(f"with layer {layer} converted the model's predictions are not finite: try float32")
            self._journal.add(converted, kls)
        return kls

    def convert(self, layer: int, left: set[int]) -> None:
        """Converts a layer for good.

        Args:
            layer: layer index.
            left: layers that may be tried later.
        """
        setattr(self._layers[layer], self._name, self._dsla[layer])
        self._converted.append(layer)
        self._activations.changed(layer, sorted(left))

    @contextmanager
    def _conversion(self, layer: int) -> Iterator[None]:
        setattr(self._layers[layer], self._name, self._dsla[layer])
        try:
            yield
        finally:
            setattr(self._layers[layer], self._name, self._softmax[layer])

    def _predictions(self, x: Tensor, start: int) -> Tensor:
        """What the head reads, at some positions, from the inputs `[1, T, hidden]` of layer `start`: `[1, T / 8, hidden]`."""
        return self._trunk.norm(self._trunk.run(x.to(self._trunk.device), start)[:, ::STRIDE])


def floor_mixer(probe: Probe) -> DslaMixer:
    """Window and sinks alone. What its states would be does not matter, so they are the cheapest there are."""
    parameter = next(probe.model.parameters())
    config = floor_config(probe.config)
    mixer = cast(DslaMixer(config, attention_shape(probe.model.config)), parameter.dtype).to(parameter.device)
    mixer.states_off = mixer.all_states
    return mixer.eval().requires_grad_(False)


def floor_config(config: DslaConfig) -> DslaConfig:
    """The settings `config` with the smallest states and no deltas."""
    return dataclasses.replace(config, n_states=1, feature_map="elu", feature_dim=0, gate_shape="scalar", delta_rank=0)
