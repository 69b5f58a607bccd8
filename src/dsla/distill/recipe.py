"""The recipe: everything a conversion does, as data (YAML)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from dsla.errors import ConfigError
from dsla.mixers import DslaConfig
from dsla.schema import from_data

ORDER_METRICS = ("kl", "kl_worst", "greedy", "greedy_worst", "entropy", "outliers", "retrieval", "random")
"""Names of the metrics; `dsla.sensitivity.METRICS` holds what they do."""

_BEYOND = 8


@dataclass(frozen=True)
class OrderSettings:
    """How the order of the layers is found.

    Attributes:
        metric: `kl` (measured on converting one layer at a time), `greedy` (measured, given the layers converted before),
            `kl_worst` and `greedy_worst` (the same, the window of text that minds most counting as much as all together),
            `entropy` (of attention; the paper's), `outliers` (among weights and what meets them), `retrieval` (attention
            that copies a needle), or `random`.
        also: further metrics whose scores are recorded; those that cost little always are.
        windows: windows of text they are averaged over.
        recall_windows: further windows, which say their first half once more: what a layer finds again counts there.
        seq_len: tokens a window.
        candidates: layers the greedy search tries for each place.
    """

    metric: str = "greedy"
    also: tuple[str, ...] = ()
    windows: int = 8
    recall_windows: int = 0
    seq_len: int = 1024
    candidates: int = 4

    @property
    def all_windows(self) -> int:
        """Windows of both kinds."""
        return self.windows + self.recall_windows


@dataclass(frozen=True)
class DataSettings:
    """What text a layer is trained on.

    Attributes:
        seq_len: tokens of the longest rows; what is left of a document, and shorter ones, make shorter rows.
        tokens: training tokens; fewer by less than a batch may be used.
        valid_tokens: further tokens, of other documents, for the reported errors.
    """

    seq_len: int = 2048
    tokens: int = 131_072
    valid_tokens: int = 8_192


@dataclass(frozen=True)
class TrainSettings:
    """How one layer is trained.

    Attributes:
        epochs: passes over the training tokens.
        batch_tokens: tokens an optimiser step.
        lr: peak learning rate (AdamW, cosine to a tenth).
        warmup: share of the steps the rate rises over.
        weight_decay: AdamW's.
        grad_clip: largest gradient norm.
        gate_contrast: weight of the term that drives history and recency gates apart.
    """

    epochs: int = 3
    batch_tokens: int = 2048
    lr: float = 0.01
    warmup: float = 0.05
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    gate_contrast: float = 0.01


@dataclass(frozen=True)
class StageSettings:
    """Training all converted layers together against the teacher's logits, at levels drawn anew each step.

    Attributes:
        name: of the stage, part of its files' names.
        tokens: training tokens.
        seq_len: tokens of the longest rows.
        batch_tokens: tokens an optimiser step; half of its rows go to the highest level, half to the drawn one.
        valid_tokens: held-out tokens on which the weights before and after are compared.
        lr: peak learning rate (AdamW, cosine to a tenth).
        warmup: share of the steps the rate rises over.
        grad_clip: largest gradient norm.
        on_policy: share of the steps whose text the model continues itself, at the highest level.
        checks: how many levels, spread evenly up to the highest, are compared.
        tolerance: the stage's weights are dropped if perplexity grows by more than this share at any level compared.
    """

    name: str = "nested"
    tokens: int = 524_288
    seq_len: int = 1024
    batch_tokens: int = 2048
    valid_tokens: int = 8_192
    lr: float = 0.0003
    warmup: float = 0.05
    grad_clip: float = 1.0
    on_policy: float = 0.0
    checks: int = 8
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        where = f"recipe.stages, stage {self.name!r}"
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.name):
            raise ConfigError(f"{where}: a name is made of small letters, digits and '-', and starts with a letter")
        if min(self.seq_len, self.checks) < 1 or min(self.tokens, self.batch_tokens, self.valid_tokens) < self.seq_len:
            raise ConfigError(
                f"{where}: tokens, batch_tokens and valid_tokens must be at least seq_len, checks at least 1"
            )
        if not (0 < self.lr < math.inf and 0 < self.grad_clip < math.inf and 0 <= self.tolerance < math.inf):
            raise ConfigError(f"{where}: lr and grad_clip must be above 0, tolerance at least 0")
        if not (0 <= self.warmup <= 1 and 0 <= self.on_policy <= 1):
            raise ConfigError(f"{where}: warmup and on_policy are shares, from 0 to 1")


@dataclass(frozen=True)
class Recipe:
    """A conversion.

    Attributes:
        mixer: settings of the converted layers.
        order: how the order is found, where no plan is given.
        data: text.
        train: optimisation of a layer.
        stages: trainings of all layers together, after the chain, one after the other.
        layers: how many layers of the order are converted, 0 = all.
        seed: of data order and initial weights.
    """

    mixer: DslaConfig = field(default_factory=DslaConfig)
    order: OrderSettings = field(default_factory=OrderSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    stages: tuple[StageSettings, ...] = ()
    layers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, names in (("metric", (self.order.metric,)), ("also", self.order.also)):
            for name in names:
                if name not in ORDER_METRICS:
                    raise ConfigError(f"recipe.order.{key} must be one of {', '.join(ORDER_METRICS)}, found {name!r}")
        if self.order.recall_windows < 0:
            raise ConfigError(f"recipe.order.recall_windows must be at least 0, found {self.order.recall_windows}")
        twice = 2 * (self.mixer.window + self.mixer.sinks + _BEYOND)
        if self.order.recall_windows and self.order.seq_len < twice:
            raise ConfigError(
                f"recipe.order.seq_len is {self.order.seq_len}: what recall windows say once more must lie beyond the mixer's "
                f"window and sinks; it must be at least {twice}, or recall_windows 0"
            )
        if self.order.candidates < 1:
            raise ConfigError(f"recipe.order.candidates must be at least 1, found {self.order.candidates}")
        if self.data.tokens < self.data.seq_len or self.data.valid_tokens < self.data.seq_len:
            raise ConfigError(f"recipe.data: tokens and valid_tokens must be at least seq_len ({self.data.seq_len})")
        stages = [stage.name for stage in self.stages]
        if len(set(stages)) < len(stages):
            raise ConfigError(f"recipe.stages: two stages have the name {max(stages, key=stages.count)!r}")
        if self.data.tokens < self.train.batch_tokens:
            raise ConfigError(f"recipe.data.tokens must be at least train.batch_tokens ({self.train.batch_tokens})")
        if self.train.batch_tokens < self.data.seq_len:
            raise ConfigError(f"recipe.train.batch_tokens must be at least data.seq_len ({self.data.seq_len})")
        if min(self.train.epochs, self.order.windows, self.order.seq_len, self.data.seq_len) < 1 or self.layers < 0:
            raise ConfigError("recipe: epochs, windows and seq_len must be at least 1, layers at least 0")
        for names, low in ((("lr", "grad_clip"), "above"), (("warmup", "weight_decay", "gate_contrast"), "at least")):
            for name in names:
                value = getattr(self.train, name)
                if not (0 <= value < math.inf) or (low == "above" and not value):
                    raise ConfigError(f"recipe.train.{name} must be a number {low} 0, found {value}")
        if self.train.warmup > 1:
            raise ConfigError(f"recipe.train.warmup is a share of the steps, at most 1, found {self.train.warmup}")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Reads a YAML recipe; keys left out keep their defaults.

        Raises:
            ConfigError: if it is not there, no YAML, or has unknown keys or wrong types.
        """
        import yaml

        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read recipe {path}: {error}") from None
        return from_data(cls, {} if data is None else data, path.name)
