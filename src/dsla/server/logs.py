"""What the server writes down: one line a record, as text for people or as a JSON object for programs.

Below the level `debug` there are no stack traces, since they hold paths: of an error only its type, its place in this
package, and, if it is one of this package's own, its message are written.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from dsla.errors import DslaError

FORMATS = ("text", "json")
"""Forms of the log a user can ask for."""

LEVELS = ("debug", "info", "warning", "error")
"""Levels of the log a user can ask for; each holds those behind it."""


class _Lines(logging.Formatter):
    """What both forms have in common."""

    def __init__(self, traces: bool) -> None:
        super().__init__()
        self._traces = traces

    def error(self, record: logging.LogRecord) -> dict[str, Any]:
        """What a record says of an exception."""
        if not record.exc_info or record.exc_info[1] is None:
            return {}
        error = record.exc_info[1]
        found: dict[str, Any] = {"error": type(error).__name__, "place": _place(error.__traceback__)}
        if isinstance(error, DslaError):
            found["reason"] = str(error)
        if self._traces:
            found["trace"] = "".join(traceback.format_exception(error))
        return found


class JsonLines(_Lines):
    """One JSON object a record: `time` (UTC), `level`, `logger`, `message`, the fields of the record, and of an exception
    `error`, `place` and, of this package's own ones, `reason`.

    Args:
        traces: add `trace`, the stack trace.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
            **self.error(record),
        }
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(_Lines):
    """Local time, level and message.

    Args:
        traces: add stack traces, on lines of their own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname:<7} {' '.join(record.getMessage().split())}"
        error = self.error(record)
        if error:
            line += f": {error['error']} in {error['place']}" + (f": {error['reason']}" if "reason" in error else "")
        return line + f"\n{error['trace'].rstrip()}" if "trace" in error else line


@contextmanager
def logging_to(stream: TextIO, form: str, level: str) -> Iterator[None]:
    """Writes all records of a level and above to a stream, until the end of the context.

    Args:
        stream: where to.
        form: one of `FORMATS`.
        level: one of `LEVELS`. Records of other packages below `warning` are left out at any level.
    """
    handler = logging.StreamHandler(stream)
    traces = level == "debug"
    handler.setFormatter(JsonLines(traces) if form == "json" else TextLines(traces))
    handler.setLevel(level.upper())
    ours, root = logging.getLogger("dsla"), logging.getLogger()
    before = ours.level
    ours.setLevel(level.upper())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(before)


def _place(trace: TracebackType | None) -> str:
    """Module and line of the innermost frame in this package; `?` where there is none."""
    places = [
        f"{frame.f_globals.get('__name__', '?')}:{line}"
        for frame, line in traceback.walk_tb(trace)
        if str(frame.f_globals.get("__name__")).startswith("dsla.")
    ]
    return places[-1] if places else "?"
