"""Dataclasses from plain data (JSON, YAML), strictly: unknown keys, missing keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any, TypeVar

from dsla.errors import ConfigError

T = TypeVar("T")


def from_data(cls: type[T], data: Any, where: str) -> T:
    """Builds the dataclass `cls` from a mapping, nested dataclasses included.

    Args:
        cls: a dataclass whose fields are int, float, str, bool, tuples of these, dicts, or dataclasses.
        data: what JSON or YAML gave.
        where: what the data is, for messages.

    Raises:
        ConfigError: naming the key, what was found and what was expected.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping, found {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields), key=str)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_data(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, x, f"{where}[{i}]") for i, x in enumerate(value))
    if origin is dict and isinstance(value, dict):
        item = typing.get_args(hint)[1]
        return {key: _convert(item, x, f"{where}.{key}") for key, x in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        advice = _advice(value) if expected is float and isinstance(value, str) else ""
        raise ConfigError(f"{where}: expected {getattr(expected, '__name__', expected)}, found {value!r}{advice}")
    return value


def _advice(text: str) -> str:
    """How to write a number that YAML takes for text: its floats need a dot, and a sign in the exponent."""
    parts = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", text)
    return f": write {parts[1]}{parts[2] or '.0'}e{parts[3] or '+'}{parts[4]}" if parts else ""
