"""The folder of an evaluation: what it is of, and its items as they are finished. A run that was killed goes on from it.

run.json       what was evaluated with what; another evaluation is refused
items.jsonl    one scored item a line
speed.json     what was measured of speed
report.*       written when all is scored
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsla.convert.adapter import Adapter, read_manifest
from dsla.errors import ConfigError, DataError
from dsla.evals.task import Item
from dsla.storage import write_json

FORMAT = 1
Key = tuple[int, str, str]
"""Level, states and task of an item."""


class Store:
    """Items on disk.

    Args:
        folder: where; made if it is not there.
        identity: what is evaluated with what, as JSON: every entry must be the same for a run to go on.

    Attributes:
        folder: as given.
        items: (level, states, task) -> id -> item, in the order they were scored in.

    Raises:
        ConfigError: the folder holds another evaluation, or files that are none.
        DataError: the folder's files are damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.items = folder, dict[Key, dict[str, Item]]()
        identity = {"format": FORMAT, **json.loads(json.dumps(identity))}
        folder.mkdir(parents=True, exist_ok=True)
        run = folder / "run.json"
        if run.exists():
            _same(folder, _read(run), identity)
        elif any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no evaluation: choose another --out")
        else:
            write_json(run, identity)
        self._path = folder / "items.jsonl"
        if self._path.exists():
            self._load()

    @property
    def speed(self) -> dict[str, Any]:
        """What was measured of speed; empty where nothing was."""
        path = self.folder / "speed.json"
        return _read(path) if path.exists() else {}

    def keep_speed(self, measured: Mapping[str, Any]) -> None:
        """Keeps what was measured."""
        write_json(self.folder / "speed.json", measured)

    def of(self, key: Key) -> dict[str, Item]:
        """Items of a task at a setting, by id."""
        return self.items.setdefault(key, {})

    @contextmanager
    def adding(self) -> Iterator[Adder]:
        """Adds items while it is open; each is in the file before the next one is scored.

        Raises:
            ConfigError: another process is adding items.
        """
        import fcntl

        with open(self._path, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is evaluating into {self.folder}: wait for it or choose another --out"
                ) from None
            yield Adder(self, file)
            os.fsync(file.fileno())

    def _load(self) -> None:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            # The run was killed while it wrote its last line.
            with open(self._path, "r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
            try:
                entry = json.loads(line)
                key = (int(entry.pop("level")), str(entry.pop("states")), str(entry.pop("task")))
                item = Item(**entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self._path}, line {number} is damaged ({error}): remove that line, its item is scored again"
                ) from None
            self.of(key)[item.id] = item


class Adder:
    """Writes items to a store's file."""

    def __init__(self, store: Store, file: Any) -> None:
        self._store, self._file = store, file

    def __call__(self, key: Key, item: Item) -> None:
        """Adds an item.

        Raises:
            DataError: its score is no number.
        """
        level, states, task = key
        if not abs(item.score) < float("inf") or not 0 <= item.weight < float("inf"):
            raise DataError(
                f"{task} at level {level}, states {states}: item {item.id!r} has the score {item.score} and the weight "
                f"{item.weight}: the model's output is not finite"
            )
        entry = {"level": level, "states": states, "task": task, **dataclasses.asdict(item)}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        self._store.of(key)[item.id] = item


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} is damaged: expected an object, found {type(data).__name__}")
    return data


def _same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in now.keys() | before.keys():
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} holds another evaluation: its {key} is {_brief(before.get(key))}, now it is {_brief(now.get(key))}; "
                "choose another --out"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def adapter_digest(adapter: Adapter) -> str:
    """Hash of what an adapter computes: its order, its mixer's settings, and the hashes of its layers' files."""
    manifest, plan = read_manifest(adapter.path), adapter.plan
    layers = [manifest["layers"][str(layer)]["sha256"] for layer in adapter.mixers]
    content = [list(adapter.mixers), dataclasses.asdict(plan.mixer), layers]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
