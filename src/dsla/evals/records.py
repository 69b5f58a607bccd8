"""Task files: one JSON object a line, plain, `.gz` or `.zst`, checked against what a task needs of them."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsla.distill.data import open_text
from dsla.errors import DataError


def read_records(
    path: Path,
    schema: Mapping[str, type],
    limit: int | None = None,
    check: Callable[[dict[str, Any]], str | None] = lambda record: None,
) -> list[dict[str, Any]]:
    """The records of a task file; further keys are left in them.

    Args:
        path: the file.
        schema: key -> type its value must have in every record; a `list` may not be empty, and an `id` not come twice.
        limit: read no more than this many.
        check: what is wrong with a record whose types are right, None if nothing is.

    Raises:
        DataError: the file is missing, damaged, empty, or a record does not fit, naming file, line and key.
    """
    records: list[dict[str, Any]] = []
    seen: set[str] = set()
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if len(records) == limit:
                    break
                if line.strip():
                    record = _checked(line, schema, f"{path}, line {number}")
                    if "id" in schema and record["id"] in seen:
                        raise DataError(f"{path}, line {number}: id {record['id']!r} comes twice")
                    if (wrong := check(record)) is not None:
                        raise DataError(f"{path}, line {number}: {wrong}")
                    seen.add(record.get("id", ""))
                    records.append(record)
    except UnicodeDecodeError:
        raise DataError(f"{path} is binary or not UTF-8 text") from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not records:
        raise DataError(f"{path} holds no records")
    return records


def shuffled(count: int, seed: str) -> list[int]:
    """Indices 0 to `count` - 1 in an order that is the same everywhere; its first ones are a fair sample."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def wrong_text(record: dict[str, Any], key: str) -> str | None:
    """What is wrong with a list that must hold texts, none of them empty."""
    for at, value in enumerate(record[key]):
        if not isinstance(value, str) or not value.strip():
            return f"{key!r}[{at}] must be a text that is not empty, found {value!r}"
    return None


def _checked(line: str, schema: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {type(record).__name__}")
    for key, kind in schema.items():
        if key not in record:
            raise DataError(f"{where}: key {key!r} is missing; expected keys: {', '.join(schema)}")
        value = record[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{where}: {key!r} must be {kind.__name__}, found {type(value).__name__}")
        if value == []:
            raise DataError(f"{where}: {key!r} is empty")
    return record
