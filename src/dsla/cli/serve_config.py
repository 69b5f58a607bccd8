"""Where the settings of `dsla serve` come from: flags, then the environment, then a YAML file, then defaults.

Typer puts the four in order. What is here reads the file, finds names that nobody knows, and shows what came from where.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from dsla.errors import ConfigError

CONTEXT = {"auto_envvar_prefix": "DSLA"}
"""Settings of the command's context: every option is also read from the environment, `--max-waiting` as `DSLA_MAX_WAITING`."""

_PREFIX = "DSLA_"
_OTHERS = {"DSLA_HOME", "DSLA_DEBUG", "DSLA_KERNELS", "DSLA_API_KEY", "DSLA_CONFIG", "DSLA_PRINT_CONFIG"}
"""Names in the environment that are not settings of a server; the last two are read before those."""

_NOT_IN_FILE = ("config", "print_config")
_SECRET = ("api_keys", "admin_key")
_ALIKE = 0.8
_NOTHING = ("", "null", "Null", "NULL", "~")
_LINKS = "; Kubernetes sets it where a service is named dsla: switch enableServiceLinks off, or rename the service"


def read_config(context: typer.Context, path: str | None) -> str | None:
    """Callback of `--config`, which comes before all other options: their values may be in the file.

    Args:
        context: of the command.
        path: YAML file, or None.

    Raises:
        ConfigError: the file cannot be read; an unknown key in it or a name in the environment that is nearly one; a value
            that an option does not take.
    """
    options = {_key(option): option for option in context.command.params if option.name not in _NOT_IN_FILE}
    _check_environment(context, options)
    values = {}
    for key, value in (_read(path) if path else {}).items():
        if key not in options:
            raise ConfigError(f"{path}: unknown key {key!r}: the nearest one is {_nearest(key, options)!r}")
        option, where = options[key], f"{path}: {key}"
        values[str(option.name)] = found = _listed(value, getattr(option, "multiple", False), where)
        _check(context, option, found, where)
    context.default_map = values
    return path


def show_config(context: typer.Context, path: str | None) -> str:
    """All settings as a YAML file, each with where it came from; keys are hidden.

    Args:
        context: of the command, after its options have been read.
        path: of the file that was read, or None.
    """
    rows = []
    for option in context.command.params:
        name, key = str(option.name), _key(option)
        if name in _NOT_IN_FILE:
            continue
        value, source = context.params[name], context.get_parameter_source(name)
        came = {
            "COMMANDLINE": "flag",
            "ENVIRONMENT": f"environment, {_variable(option)}",
            "DEFAULT_MAP": f"file {path}",
        }.get(source.name if source else "", "default")
        if name in _SECRET and value:
            value = "hidden" if isinstance(value, str) else ["hidden"] * len(value)
        unset = value is None or value in ([], ())
        rows.append((f"# {key}:" if unset else f"{key}: {json.dumps(value, ensure_ascii=False)}", came))
    width = max(len(text) for text, _ in rows)
    return "\n".join(f"{text:<{width}}  # {came}" for text, came in rows)


def _check_environment(context: typer.Context, options: dict[str, Any]) -> None:
    known = {_variable(option): option for option in options.values()}
    for name in known.keys() & os.environ.keys():
        hint = _LINKS if os.environ[name].startswith("tcp://") else ""
        _check(context, known[name], known[name].value_from_envvar(context), f"environment: {name}", hint)
    # Others may have names of their own with this beginning.
    for name in sorted(os.environ.keys() - known.keys() - _OTHERS):
        nearest = difflib.get_close_matches(name, known, 1, _ALIKE) if name.startswith(_PREFIX) else []
        if nearest:
            raise ConfigError(f"environment: unknown name {name}: the nearest one is {nearest[0]}")


def _check(context: typer.Context, option: Any, value: Any, where: str, hint: str = "") -> None:
    try:
        option.process_value(context, value)
    except typer.BadParameter as error:
        shown = "" if option.name in _SECRET else f", found {value!r}"
        raise ConfigError(f"{where}: {error.message.rstrip('.')}{shown}{hint}") from None


def _read(path: str) -> dict[str, Any]:
    import yaml

    try:
        # Texts only: what a number or a switch looks like, the options know better than YAML, which takes `on` for true.
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not valid YAML: {error}") from None
    if data in ("", None):
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, as 'port: 8000', found a {type(data).__name__}")
    return data


def _listed(value: Any, multiple: bool, where: str) -> str | list[str]:
    """The value of an option that is given once, or several times."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items) or (isinstance(value, list) and not multiple):
        raise ConfigError(f"{where}: expected {'values' if multiple else 'one value'}, found {_kind(value)}")
    if any(item in _NOTHING for item in items):
        raise ConfigError(f"{where} has no value: leave the key out for the default")
    return items if multiple else items[0]


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "keys and values"


def _key(option: Any) -> str:
    """Name of an option in a file: as its flag."""
    return str(option.opts[0]).removeprefix("--")


def _variable(option: Any) -> str:
    """Name of an option in the environment."""
    return f"{_PREFIX}{str(option.name).upper()}"


def _nearest(name: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(name, names, 1, 0.0)[0]
