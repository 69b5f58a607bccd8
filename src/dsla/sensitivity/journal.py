"""Measurements of a search that takes long, kept so that it goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from dsla.errors import PlanError
from dsla.storage import write_json


class Journal:
    """KL of every window of text, by the set of layers that is converted.

    Args:
        path: a JSON file, read if it is there and written after every measurement. Default: memory alone.
        on_add: called with the number of measurements known, after each new one.

    Raises:
        PlanError: if the file is damaged.
    """

    def __init__(self, path: Path | None = None, on_add: Callable[[int], None] = lambda known: None) -> None:
        self._path, self._on_add, self._known = path, on_add, dict[str, tuple[float, ...]]()
        if path is not None and path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                self._known = {str(key): tuple(map(float, kls)) for key, kls in known.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise PlanError(f"{path} is damaged ({error}): remove it, and the search begins anew") from None

    def find(self, converted: Iterable[int]) -> tuple[float, ...] | None:
        """The KL of each window with these layers converted, if it was measured."""
        return self._known.get(_key(converted))

    def add(self, converted: Iterable[int], kls: tuple[float, ...]) -> None:
        """Keeps a measurement.

        Raises:
            PlanError: if it cannot be written.
        """
        self._known[_key(converted)] = kls
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, self._known)
            except OSError as error:
                raise PlanError(f"cannot write {self._path}: {error.strerror or error}") from error
        self._on_add(len(self._known))


def _key(converted: Iterable[int]) -> str:
    return " ".join(map(str, sorted(converted)))
