"""Runs tasks at levels, keeps every item, and says how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsla.errors import DataError
from dsla.evals.setting import TEACHER, Setting
from dsla.evals.speed import Speeds
from dsla.evals.store import Store
from dsla.evals.subject import Subject
from dsla.evals.task import Task


@dataclass(frozen=True)
class Progress:
    """Where an evaluation is.

    Attributes:
        setting: what is being scored.
        task: with what.
        task_done: items scored of this task at this setting.
        done: items scored of all tasks at all settings.
        total: items in all.
        seconds_left: estimate.
    """

    setting: Setting
    task: Task
    task_done: int
    done: int
    total: int
    seconds_left: float


def seconds_of(task: Task, setting: Setting, speeds: Speeds) -> float:
    """Estimate of the time a task takes at a setting; 0 where the task does not say what it reads."""
    speed = speeds[setting.level]
    return task.reads / speed.prefill.value + task.writes / speed.decode.value


def seconds_left(tasks: Sequence[Task], settings: Sequence[Setting], store: Store, speeds: Speeds) -> float:
    """Estimate of the time all that is not scored yet takes."""
    return sum(
        seconds_of(task, setting, speeds) * (1 - len(store.of(setting.key(task))) / max(task.items, 1))
        for task in tasks
        for setting in settings
    )


def evaluate(
    subject: Subject, tasks: Sequence[Task], settings: Sequence[Setting], store: Store, speeds: Speeds,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:  # fmt: skip
    """Scores what is not scored yet. Task by task, so that a finished one can be compared over all levels.

    Args:
        subject: what is evaluated.
        tasks: with what.
        settings: at what; the teacher is one of them.
        store: takes the items.
        speeds: for the estimate of the time left.
        on_progress: called after every item.

    Raises:
        DataError: a task needs more than the model's context, gives another number of items than it said, or its scores are
            not finite.
    """
    for task in tasks:
        if task.tokens > subject.context:
            raise DataError(
                f"{task.name} reads {task.tokens} tokens at once, the model's context is {subject.context}: leave it out"
            )
    total = len(settings) * sum(task.items for task in tasks)
    done = sum(len(store.of(setting.key(task))) for task in tasks for setting in settings)
    expected, start = seconds_left(tasks, settings, store, speeds), time.monotonic()
    try:
        with store.adding() as add:
            for task in tasks:
                for setting in settings:
                    held = store.of(setting.key(task))
                    if len(held) == task.items:
                        continue
                    setting.apply(subject)
                    for item in task.run(subject, frozenset(held)):
                        add(setting.key(task), item)
                        done += 1
                        # What was estimated is corrected by how long the part that is done took.
                        left = seconds_left(tasks, settings, store, speeds)
                        pace = (time.monotonic() - start) / (expected - left) if expected > left else 1.0
                        on_progress(Progress(setting, task, len(held), done, total, left * pace))
                    if len(held) != task.items:
                        raise DataError(f"{task.name} gave {len(held)} items at {setting}, expected {task.items}")
    finally:
        TEACHER.apply(subject)
