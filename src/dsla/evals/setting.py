"""What a model can be set to while it is evaluated: a level, and what is read from its states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsla.errors import ConfigError
from dsla.evals.store import Key
from dsla.evals.subject import Subject
from dsla.evals.task import Task


@dataclass(frozen=True)
class Setting:
    """A level, and what is read from its states.

    Attributes:
        level: how many layers are converted.
        states: `on`; `off` (window and sinks alone, with the trained adapter); `floor` (the same without an adapter); `no 0`,
            `no 1`, ... (one state left out).
    """

    level: int
    states: str = "on"

    def apply(self, subject: Subject) -> None:
        """Sets a subject to it."""
        off = {"on": frozenset[int](), "off": subject.all_states, "floor": subject.all_states}.get(self.states)
        if off is None:
            off = frozenset([int(self.states.removeprefix("no "))])
        subject.set(self.level, off, untrained=self.states == "floor")

    def key(self, task: Task) -> Key:
        """Where a store keeps a task's items at this setting."""
        return self.level, self.states, task.name

    def __str__(self) -> str:
        return f"level {self.level}" + ("" if self.states == "on" else f", states {self.states}")


TEACHER = Setting(0)


def chosen_settings(
    levels: Sequence[int], states: Sequence[str], highest: int | None, n_states: int = 0
) -> list[Setting]:
    """Settings to evaluate: the teacher first, then every level with every choice of states.

    Args:
        levels: wanted levels; 0 is always added.
        states: `on`, `off`, `floor`, `each` (every state left out in turn).
        highest: the highest level there is, None = no adapter.
        n_states: states of a converted layer.

    Raises:
        ConfigError: a level or a choice of states does not exist.
    """
    wrong = [level for level in levels if not 0 <= level <= (highest or 0)]
    if wrong:
        has = f"its adapter has levels 0 to {highest}" if highest else "without an adapter there is level 0 alone"
        raise ConfigError(f"there is no level {wrong[0]}: {has}")
    chosen: list[str] = []
    for name in states:
        if name not in ("on", "off", "floor", "each"):
            raise ConfigError(f"--states: expected on, off, floor or each, found {name!r}")
        chosen += [f"no {state}" for state in range(n_states)] if name == "each" else [name]
    return [TEACHER, *(Setting(x, name) for x in sorted(set(levels) - {0}) for name in dict.fromkeys(chosen))]
