"""What `order` and `convert` share: the teacher, the recipe, and progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dsla.convert import Plan, Teacher
from dsla.convert.load import find_model
from dsla.distill import Recipe
from dsla.distill.data import read_documents, token_windows
from dsla.errors import ConfigError
from dsla.families import context_length
from dsla.hub import model_hash
from dsla.sensitivity import make_plan

_LINE_SECONDS = 30.0


class Bars:
    """Progress of what is under way: bars on a terminal, elsewhere a line now and then.

    Args:
        console: where to show it. Default: stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._tasks: dict[str, TaskID] = {}
        self._overall = ""
        self._last_line = float("-inf")

    def __enter__(self) -> Self:
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Shows `done` of `total` of one thing among all that is to be done; when it is full it goes."""
        if not self._console.is_terminal:
            self._line(f"{name}: {done} of {total}  {note}")
        elif done < total:
            self._show(name, done, total, note)
        elif name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))

    def overall(self, name: str, done: int, total: int, note: str = "") -> None:
        """Shows `done` of `total` of all that is to be done: a bar that stays, or the end of every line."""
        self._overall = f"{done} of {total} {name} done  {note}"
        if self._console.is_terminal:
            self._show(name, done, total, note)

    def say(self, text: str) -> None:
        """Prints a line, above the bars."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _show(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)

    def _line(self, text: str) -> None:
        if time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{text}  {self._overall}".rstrip())


def load_recipe(path: Path | None) -> Recipe:
    """The recipe at `path`, or the built-in one."""
    return Recipe() if path is None else Recipe.load(path)


def find_teacher(name: str | None) -> tuple[Path, Any, Teacher]:
    """Folder, config and identity of the teacher; its weights are hashed, not loaded."""
    path, config = find_model(name)
    return (
        path,
        config,
        Teacher(path.name if name is None or Path(name).is_dir() else name, model_hash(path), config.num_hidden_layers),
    )


def check_length(part: str, seq_len: int, config: Any) -> None:
    """Checks that windows fit the teacher's context.

    Args:
        part: part of the recipe, for messages.
        seq_len: tokens of a window.
        config: the teacher's.

    Raises:
        ConfigError: they are longer.
    """
    if seq_len > context_length(config):
        context = f"the model's context is {context_length(config)} tokens"
        raise ConfigError(f"recipe.{part}.seq_len is {seq_len}, but {context}: lower it")


def measured_plan(
    model: Any, tokenizer: Any, teacher: Teacher, recipe: Recipe, data: Sequence[Path], bars: Bars
) -> Plan:
    """A plan from the recipe's order settings, with a bar for every metric."""
    settings = recipe.order
    windows = token_windows(tokenizer, read_documents(data), settings.seq_len, settings.windows, recipe.seed)
    return make_plan(
        model,
        teacher,
        windows,
        recipe.mixer,
        settings.metric,
        lambda metric, done, total: bars.update(f"order by {metric}", done, total),
    )
