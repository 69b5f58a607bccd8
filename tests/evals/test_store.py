"""The folder of an evaluation: it goes on where it was killed, and is nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsla.errors import ConfigError, DataError
from dsla.evals.store import Store
from dsla.evals.task import Item

IDENTITY = {"model_sha256": "abc", "suite": "quick", "limit": None, "files": {"a": "1"}}
KEY = (3, "off", "passkey/1024")


def filled(folder: Path) -> Store:
    store = Store(folder, IDENTITY)
    with store.adding() as add:
        add(KEY, Item("0", 1.0, 2.0, {"parts": {"depth 0%": [1.0, 1]}}))
        add((0, "on", "passkey/1024"), Item("0", 0.5))
        add(KEY, Item("1", 0.25))
    return store


def test_items_come_back(tmp_path: Path) -> None:
    store, again = filled(tmp_path / "out"), Store(tmp_path / "out", IDENTITY)
    assert again.items == store.items
    assert again.of(KEY)["0"] == Item("0", 1.0, 2.0, {"parts": {"depth 0%": [1.0, 1]}})
    assert list(again.of(KEY)) == ["0", "1"]


@pytest.mark.parametrize("kept", [1, 5, 30])
def test_a_line_cut_short_is_dropped(tmp_path: Path, kept: int) -> None:
    path = filled(tmp_path).folder / "items.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    again = Store(tmp_path, IDENTITY)
    assert list(again.of(KEY)) == ["0"]
    with again.adding() as add:
        add(KEY, Item("1", 0.25))
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "other", [{"model_sha256": "abd"}, {"suite": "full"}, {"limit": 3}, {"files": {"a": "2"}}, {"new": 1}]
)
def test_another_evaluation_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    before = filled(tmp_path)
    with pytest.raises(ConfigError, match=f"holds another evaluation: its {next(iter(other))} is"):
        Store(tmp_path, IDENTITY | other)
    assert Store(tmp_path, IDENTITY).items == before.items


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no evaluation"):
        Store(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"level": 0, "states": "on", "task": "t", "id": "0"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = filled(tmp_path).folder / "items.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"items.jsonl, line 2 is damaged"):
        Store(tmp_path, IDENTITY)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json is damaged"):
        Store(tmp_path, IDENTITY)
    (tmp_path / "run.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="expected an object, found list"):
        Store(tmp_path, IDENTITY)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    store, other = Store(tmp_path, IDENTITY), Store(tmp_path, IDENTITY)
    with store.adding(), pytest.raises(ConfigError, match="another process"), other.adding():
        pass
    with other.adding() as add:
        add(KEY, Item("0", 1.0))


@pytest.mark.parametrize("item", [Item("7", float("nan")), Item("7", float("inf")), Item("7", 1.0, float("nan"))])
def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, item: Item) -> None:
    store = Store(tmp_path, IDENTITY)
    with store.adding() as add, pytest.raises(DataError, match="passkey/1024 at level 3, states off: item '7'"):
        add(KEY, item)
    assert Store(tmp_path, IDENTITY).items == {}


def test_speed_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, IDENTITY)
    assert store.speed == {}
    store.keep_speed({"0": {"read": 8}})
    assert Store(tmp_path, IDENTITY).speed == {"0": {"read": 8}}
