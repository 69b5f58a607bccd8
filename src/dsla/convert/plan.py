"""The plan: which layers are converted in which order, to which mixer, of which teacher. Plain data, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from dsla.errors import ConfigError, PlanError
from dsla.mixers import DslaConfig
from dsla.schema import from_data
from dsla.storage import write_json


@dataclass(frozen=True)
class Teacher:
    """The model a plan was made for.

    Attributes:
        name: its name, for people.
        sha256: hash of its weights, as `dsla.hub.model_hash` gives it.
        n_layers: its number of layers.
    """

    name: str
    sha256: str
    n_layers: int


@dataclass(frozen=True)
class Plan:
    """Order and mixer settings. Level k converts the first k layers of `order`.

    Attributes:
        teacher: the model the plan is for.
        order: layer indices, least sensitive first.
        mixer: settings of every converted layer.
        metric: what `order` was sorted by.
        scores: score of each layer by metric: metric -> list over layers, low = convert first.
        versions: library -> version the plan was made with.
    """

    teacher: Teacher
    order: tuple[int, ...]
    mixer: DslaConfig = field(default_factory=DslaConfig)
    metric: str = ""
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [layer for layer in self.order if not 0 <= layer < self.teacher.n_layers]
        if missing:
            raise PlanError(
                f"plan names layer {missing[0]}, but {self.teacher.name} has layers 0 to {self.teacher.n_layers - 1}"
            )
        if not self.order:
            raise PlanError("plan names no layer")
        if len(set(self.order)) != len(self.order):
            raise PlanError(f"plan names a layer twice: {list(self.order)}")

    @property
    def max_level(self) -> int:
        """The highest level: the number of layers in the order."""
        return len(self.order)

    def layers(self, level: int) -> tuple[int, ...]:
        """The layers converted at `level`.

        Raises:
            PlanError: if the plan has no such level.
        """
        if not 0 <= level <= self.max_level:
            raise PlanError(f"level {level} is out of range: this plan has levels 0 to {self.max_level}")
        return self.order[:level]

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plan.

        Raises:
            PlanError: if the file is not there, is no JSON, or does not say what a plan must say.
        """
        try:
            return from_data(cls, json.loads(path.read_text(encoding="utf-8")), path.name)
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}: make one with `dsla order`") from None
        except OSError as error:
            raise PlanError(f"cannot read the plan at {path}: {error.strerror or error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path.name} is not valid JSON: {error}") from None
        except ConfigError as error:
            raise PlanError(str(error)) from None
