"""Running tasks: every item once, the same items however often the run is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsla.errors import ConfigError, DataError
from dsla.evals.generation import generation_tasks
from dsla.evals.haystack import Haystack
from dsla.evals.runner import Progress, evaluate
from dsla.evals.setting import TEACHER, Setting, chosen_settings
from dsla.evals.speed import Rate, Speed, measure_speed, request_bytes, speeds_from_json, speeds_to_json
from dsla.evals.store import Store
from dsla.evals.subject import Subject
from dsla.evals.synthetic import copy_task, passkey_task
from dsla.evals.task import Item, Task
from tests.evals.tiny import subject

RATE = Rate(100.0, 90.0, 110.0)
SPEEDS = {level: Speed(64, RATE, RATE) for level in range(5)}
SETTINGS = [TEACHER, Setting(2), Setting(4, "no 1"), Setting(4, "floor")]


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject()


def tasks() -> list[Task]:
    return [passkey_task(400, 5, Haystack()), copy_task(160, 3), *generation_tasks(("Hello", "Tell me"), 6)]


class Killed(Exception):
    pass


def kill_after(items: int):  # type: ignore[no-untyped-def]
    seen: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == items:
            raise Killed

    return on_progress


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(model: Subject, tmp_path: Path) -> None:
    whole = Store(tmp_path / "whole", {})
    evaluate(model, tasks(), SETTINGS, whole, SPEEDS)
    interrupted, kills = tmp_path / "interrupted", 0
    while True:
        try:
            evaluate(model, tasks(), SETTINGS, Store(interrupted, {}), SPEEDS, kill_after(7))
            break
        except Killed:
            kills += 1
            assert model.setting == (0, frozenset(), False)
            with open(interrupted / "items.jsonl", "a") as file:
                file.write('{"level": 2, "sta')
    assert kills > 5
    assert (interrupted / "items.jsonl").read_bytes() == (whole.folder / "items.jsonl").read_bytes()
    assert Store(interrupted, {}).items == whole.items


def test_nothing_is_scored_twice(model: Subject, tmp_path: Path) -> None:
    evaluate(model, tasks(), SETTINGS, Store(tmp_path, {}), SPEEDS)
    before = (tmp_path / "items.jsonl").read_bytes()
    never = [replace(task, run=lambda *_: pytest.fail("it ran")) for task in tasks()]
    evaluate(model, never, SETTINGS, Store(tmp_path, {}), SPEEDS)
    assert (tmp_path / "items.jsonl").read_bytes() == before
    more = Store(tmp_path, {})
    evaluate(model, tasks(), [TEACHER, Setting(3)], more, SPEEDS)
    assert (tmp_path / "items.jsonl").read_bytes().startswith(before)
    assert len(more.of((3, "on", "copy/160"))) == 3


def test_progress_and_time(model: Subject, tmp_path: Path) -> None:
    seen: list[Progress] = []
    evaluate(model, tasks(), SETTINGS, Store(tmp_path, {}), SPEEDS, seen.append)
    total = len(SETTINGS) * (5 + 3 + 5 * 2)
    assert [progress.done for progress in seen] == list(range(1, total + 1))
    assert {progress.total for progress in seen} == {total}
    assert seen[0].seconds_left > 0 and seen[-1].seconds_left == 0


def test_the_task_in_the_documentation_runs(model: Subject, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    store = Store(tmp_path, {})
    evaluate(model, [names["task"]], SETTINGS, store, SPEEDS)
    assert len(store.of((2, "on", "facts"))) == 2


def test_a_task_that_does_not_do_what_it_says_is_an_error(model: Subject, tmp_path: Path) -> None:
    def one(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        yield Item("0", 1.0)

    task = Task(name="t", group="long", metric="f1", run=one, items=2)
    with pytest.raises(DataError, match="t gave 1 items at level 0, expected 2"):
        evaluate(model, [task], [TEACHER], Store(tmp_path, {}), SPEEDS)
    with pytest.raises(DataError, match="reads 5000 tokens at once, the model's context is 4096"):
        evaluate(model, [replace(task, tokens=5000)], [TEACHER], Store(tmp_path, {}), SPEEDS)


def test_settings() -> None:
    assert chosen_settings([4, 2, 0, 2], ["on", "each"], 4, 2) == [
        TEACHER, Setting(2), Setting(2, "no 0"), Setting(2, "no 1"), Setting(4), Setting(4, "no 0"), Setting(4, "no 1"),
    ]  # fmt: skip
    assert chosen_settings([3], ["off"], 4, 2) == [TEACHER, Setting(3, "off")]
    assert chosen_settings([0], ["on"], None) == [TEACHER]
    with pytest.raises(ConfigError, match="no level 5: its adapter has levels 0 to 4"):
        chosen_settings([5], ["on"], 4, 2)
    with pytest.raises(ConfigError, match="no level -1"):
        chosen_settings([-1], ["on"], 4, 2)
    with pytest.raises(ConfigError, match="without an adapter there is level 0 alone"):
        chosen_settings([1], ["on"], None)
    with pytest.raises(ConfigError, match="expected on, off, floor or each, found 'of'"):
        chosen_settings([1], ["on", "of"], 4, 2)


@pytest.mark.parametrize(
    ("states", "setting"),
    [
        ("on", (3, frozenset(), False)),
        ("off", (3, frozenset([0, 1]), False)),
        ("floor", (3, frozenset([0, 1]), True)),
        ("no 1", (3, frozenset([1]), False)),
    ],
)
def test_setting_is_applied(model: Subject, states: str, setting: tuple[int, frozenset[int], bool]) -> None:
    Setting(3, states).apply(model)
    assert model.setting == setting


def test_speed_is_measured_and_kept(model: Subject) -> None:
    speeds = measure_speed(model, [0, 4])
    assert model.level == 0 and set(speeds) == {0, 4}
    for speed in speeds.values():
        assert speed.read == 1024
        assert 0 < speed.prefill.low <= speed.prefill.value <= speed.prefill.high
        assert speed.decode.value > 0
    assert speeds_from_json(speeds_to_json(speeds)) == speeds


def test_bytes_of_a_request(model: Subject) -> None:
    kv = 2 * 2 * 6 * 8
    states, near = 2 * 2 * 12 * 7 * 8, 2 * (4 + 2) * 2 * 6 * 8
    assert request_bytes(model, 0, 100) == 4 * 100 * kv
    assert request_bytes(model, 3, 100) == 100 * kv + 3 * (states + near)
