"""What `order` and `convert` share: the teacher, the recipe, and progress bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dsla.convert import Plan, Teacher
from dsla.distill import Recipe
from dsla.distill.data import read_documents, token_windows
from dsla.sensitivity import make_plan


class Bars:
    """One bar for each thing under way; on a terminal they are redrawn, elsewhere only `say` prints."""

    def __enter__(self) -> Self:
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress.start()
        self._tasks: dict[str, TaskID] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Shows `done` of `total` on the bar `name`; a bar that is full goes, except `layers`."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)
        if done == total and name != "layers":
            self._progress.remove_task(self._tasks.pop(name))

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(text, highlight=False)


def load_recipe(path: Path | None) -> Recipe:
    """The recipe at `path`, or the built-in one."""
    return Recipe() if path is None else Recipe.load(path)


def load_teacher(name: str | None, device: str) -> tuple[Any, Any, Teacher]:
    """Model, tokenizer and identity of the teacher."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsla.convert import read_config
    from dsla.families import family_of
    from dsla.hub import model_hash, resolve_model

    path = resolve_model(name)
    config = read_config(path)
    family_of(config)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model = model.to(device).eval().requires_grad_(False)
    teacher = Teacher(name or path.name, model_hash(path), config.num_hidden_layers)
    return model, AutoTokenizer.from_pretrained(path), teacher


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
