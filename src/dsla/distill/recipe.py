"""The recipe: everything a conversion does, as data (YAML)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from dsla.errors import ConfigError
from dsla.mixers import DslaConfig
from dsla.schema import from_data


@dataclass(frozen=True)
class OrderSettings:
    """How the order of the layers is found.

    Attributes:
        metric: `kl` (measured on converting one layer at a time) or `entropy` (the paper's).
        windows: windows of text it is averaged over.
        seq_len: tokens a window.
    """

    metric: str = "kl"
    windows: int = 8
    seq_len: int = 1024


@dataclass(frozen=True)
class DataSettings:
    """What text a layer is trained on.

    Attributes:
        seq_len: tokens a window.
        tokens: training tokens.
        valid_tokens: further tokens, never trained on, for the reported errors.
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
class Recipe:
    """A conversion.

    Attributes:
        mixer: settings of the converted layers.
        order: how the order is found, where no plan is given.
        data: text.
        train: optimisation.
        layers: how many layers of the order are converted, 0 = all.
        seed: of data order and initial weights.
    """

    mixer: DslaConfig = field(default_factory=DslaConfig)
    order: OrderSettings = field(default_factory=OrderSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    layers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order.metric not in ("kl", "entropy"):
            raise ConfigError(f"recipe.order.metric must be kl or entropy, found {self.order.metric!r}")
        if self.data.tokens < self.data.seq_len or self.data.valid_tokens < self.data.seq_len:
            raise ConfigError(f"recipe.data: tokens and valid_tokens must be at least seq_len ({self.data.seq_len})")
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
