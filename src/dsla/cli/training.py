"""What `order` and `convert` share: the teacher, the recipe, and progress."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsla.convert import Plan, Teacher
from dsla.convert.load import find_model
from dsla.distill import Recipe, allocator, parallel
from dsla.distill.data import Source, TeacherText, check_tokenizer, mixed_windows, said_twice
from dsla.distill.data.teacher import NAME, teacher_sources
from dsla.distill.estimate import Phase
from dsla.distill.part import Part
from dsla.errors import ConfigError
from dsla.families import context_length
from dsla.hub import model_hash
from dsla.mixers import DslaMixer
from dsla.sensitivity import make_plan

_LINE_SECONDS = 30.0
_RECENT_PARTS = 20


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


class TimeLeft:
    """Says how long the rest will take, at the speed of the last parts: those found done already took no time."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=_RECENT_PARTS)

    def __call__(self, done: int, total: int) -> str:
        """The time left after `done` of `total` parts; nothing before two of them are known."""
        self._last.append((done, time.monotonic()))
        (first, begun), (last, now) = self._last[0], self._last[-1]
        return f"about {clock((total - done) * (now - begun) / (last - first))} left" if last > first else ""


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def load_recipe(path: Path | None) -> Recipe:
    """The recipe at `path`, or the built-in one."""
    return Recipe() if path is None else Recipe.load(path)


def begin_training(device: str) -> str:
    """Prepares this process for training, alone or as one of several that `torchrun` started, of which one prints.

    Args:
        device: as the user named it.

    Returns:
        This process's device.
    """
    allocator.keep_freed_memory()
    device = parallel.join(device)
    atexit.register(parallel.leave)
    if not parallel.leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if torch.device(device).type == "cuda":
        # Products of fp32 mixers read 10 bits of mantissa, more than the 7 of the model's own bf16, and sum in fp32.
        torch.set_float32_matmul_precision("high")
    return device


def check_together(plan: Plan | None, sources: Sequence[Source | TeacherText]) -> None:
    """Checks that several processes find all that only one of them could make.

    Raises:
        ConfigError: naming what must be made before.
    """
    if parallel.processes() == 1:
        return
    if plan is None:
        raise ConfigError(
            "several processes need a plan: make it with `dsla order` in one process, and give it as --plan"
        )
    if any(isinstance(source, TeacherText) for source in sources):
        raise ConfigError(
            "several processes cannot write the teacher's text: have `dsla order` write it in one process, "
            f"and give its {NAME}.jsonl as --data"
        )


def writing(bars: Bars, part: Part) -> Callable[[int, int], None]:
    """Shows how the teacher's text grows, and ends the call between two batches of it if its time is over."""

    def written(done: int, total: int) -> None:
        bars.update(NAME, done, total)
        part.kept(f"{done} of {total} tokens of the teacher's text")

    return written


def print_estimate(phases: Sequence[Phase]) -> None:
    """Shows what a conversion will do and how long that takes, before it starts."""
    table = Table(title="estimate, from steps measured just now; without reading text")
    for name in ("phase", "tokens", "FLOPs", "FLOP/s", "time"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in phases:
        table.add_row(phase.name, f"{phase.tokens:,}", *_flops(phase.flops, phase.seconds))
    total = [sum(getattr(phase, name) for phase in phases) for name in ("flops", "seconds")]
    table.add_row("all", "", *_flops(*total), style="bold")
    Console().print(table)


def print_stop(minutes: float, where: str) -> None:
    """Says that the time of a call is over, and what to do."""
    Console().print(
        f"Stopped after {minutes:g} minutes, as asked: {where}. The same command goes on from there.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _flops(flops: float, seconds: float) -> tuple[str, str, str]:
    return f"{flops:.2e}", f"{flops / seconds:.2e}", clock(seconds)


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


def check_stages(recipe: Recipe, config: Any) -> None:
    """Checks that the rows of every stage fit the teacher's context, as `check_length`."""
    for stage in recipe.stages:
        check_length(f"stages, {stage.name}", stage.seq_len, config)


def measured_plan(
    model: Any,
    tokenizer: Any,
    teacher: Teacher,
    recipe: Recipe,
    data: Sequence[Source | TeacherText],
    progress: Path,
    bars: Bars,
    trained: Mapping[int, DslaMixer] | None = None,
    part: Part | None = None,
) -> Plan:
    """A plan from the recipe's order settings, with a bar and the time left for every metric.

    Args:
        model: the teacher.
        tokenizer: its tokenizer.
        teacher: its identity.
        recipe: order and mixer settings.
        data: where the text comes from.
        progress: folder in which an interrupted search is found again; text of the teacher goes to the one above it.
        bars: where progress is shown.
        trained: trained mixers of all layers, if they are to be converted with these.
        part: how long this call may take. Default: as long as it needs.

    Raises:
        TimeUp: if the time of this call is over; what was measured is in `progress`.
    """
    part = part or Part()
    settings = recipe.order
    check_tokenizer(tokenizer, model)
    sources = teacher_sources(
        data, model, tokenizer, recipe.data.seq_len, recipe.seed, progress.parent,
        writing(bars, part),
    )  # fmt: skip
    windows = mixed_windows(tokenizer, sources, settings.seq_len, settings.windows, recipe.seed)
    if settings.recall_windows:
        others = mixed_windows(tokenizer, sources, settings.seq_len, settings.recall_windows, recipe.seed + 1)
        windows = torch.cat([windows, said_twice(others)])
    left = defaultdict[str, TimeLeft](TimeLeft)
    return make_plan(
        model,
        teacher,
        windows,
        recipe.mixer,
        settings,
        trained,
        recipe.seed,
        progress,
        lambda metric, done, total: bars.update(f"order by {metric}", done, total, left[metric](done, total)),
        lambda known: part.kept(f"{known} layers or sets of layers measured for the order"),
    )
