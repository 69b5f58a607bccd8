"""Traces of requests: when each came and how long it was, read from files and made to fit a server."""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsla.distill.data.files import open_text
from dsla.errors import ConfigError, DataError

BLOCK_TOKENS = 512
"""Tokens of the prompt that one entry of `hash_ids` stands for."""

_FIELDS = ("t_s", "prompt_tokens", "output_tokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MILLISECOND = 1e-3


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at: when it comes, seconds since the first.
        prompt_tokens: length of its prompt.
        output_tokens: tokens it is answered with.
        hash_ids: one id for each block of `block_tokens` of its prompt: requests with equal ids share those tokens. Empty:
            it shares nothing.
        block_tokens: tokens of a block; not whole where lengths are scaled.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: float = BLOCK_TOKENS

    def scaled(self, factor: float) -> TraceRequest:
        """The same with all lengths times `factor`, at least one token each; what it shares stays the same part of it."""
        prompt, output = (max(round(n * factor), 1) for n in (self.prompt_tokens, self.output_tokens))
        return replace(self, prompt_tokens=prompt, output_tokens=output, block_tokens=self.block_tokens * factor)


@dataclass(frozen=True)
class Workload:
    """The part of a trace that is replayed.

    Attributes:
        requests: in order of arrival, the first at 0.
        dropped: requests among them in the trace that are longer than the limits, left out.
    """

    requests: tuple[TraceRequest, ...]
    dropped: int

    @property
    def rate(self) -> float:
        """Mean arrivals a second; infinite where all come at once."""
        span = self.requests[-1].at
        return (len(self.requests) - 1) / span if span else math.inf

    def at_rate(self, rate: float) -> Workload:
        """The same requests at another mean rate: the time between them is stretched, so bursts stay bursts."""
        factor = self.rate / rate if math.isfinite(self.rate) else 0.0
        return replace(self, requests=tuple(replace(request, at=request.at * factor) for request in self.requests))


def read_trace(path: Path) -> list[TraceRequest]:
    """Reads a trace: `.jsonl` with `t_s` (seconds), `prompt_tokens`, `output_tokens` and optionally `hash_ids`; or as Mooncake
    publishes it, with `timestamp` (milliseconds), `input_length`, `output_length`; or Azure's `.csv`. Packed or not.

    Args:
        path: the file; `.gz` and `.zst` are unpacked.

    Raises:
        DataError: it is not there, cannot be read or holds no request, or a line, which is named, is not of its schema.
    """
    if not path.is_file():
        raise DataError(f"no trace at {path}")
    requests = []
    try:
        with open_text(path) as file:
            rows = _csv_rows(file) if ".csv" in path.suffixes else _json_rows(file)
            before = -math.inf
            for number, row in rows:
                request = _request(row, f"{path}, line {number}")
                if request.at < before:
                    raise DataError(f"{path}, line {number}: it comes before the line above; sort the trace by time")
                before = request.at
                requests.append(request)
    except UnicodeDecodeError:
        raise DataError(f"{path} is binary or not UTF-8 text") from None
    except (EOFError, OSError, zlib.error, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not requests:
        raise DataError(f"{path} holds no request")
    return [replace(request, at=request.at - requests[0].at) for request in requests]


def fit(
    trace: Sequence[TraceRequest],
    count: int | None = None,
    length_scale: float = 1.0,
    max_prompt: int | None = None,
    max_output: int | None = None,
    max_total: int | None = None,
) -> Workload:
    """The first `count` requests of a trace that fit the limits once their lengths are scaled; nothing is ever cut.

    Args:
        trace: as `read_trace` gave it.
        count: requests to take. Default: all.
        length_scale: factor for lengths of prompts and outputs.
        max_prompt: longest prompt. Default: any.
        max_output: longest output. Default: any.
        max_total: most tokens of prompt and output. Default: any.

    Raises:
        ConfigError: no request fits.
    """
    taken: list[TraceRequest] = []
    dropped = 0
    for request in (one.scaled(length_scale) for one in trace):
        if count is not None and len(taken) == count:
            break
        sizes = (request.prompt_tokens, request.output_tokens, request.prompt_tokens + request.output_tokens)
        if all(
            limit is None or n <= limit for n, limit in zip(sizes, (max_prompt, max_output, max_total), strict=True)
        ):
            taken.append(request)
        else:
            dropped += 1
    if not taken:
        raise ConfigError(
            f"none of the {dropped:,} requests fits (prompt {max_prompt}, output {max_output}, both together {max_total} "
            "tokens at most): raise the limits or lower --length-scale"
        )
    return Workload(tuple(replace(request, at=request.at - taken[0].at) for request in taken), dropped)


def _json_rows(file: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"no JSON ({error.msg})"


def _csv_rows(file: Any) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(file)
    for row in reader:
        try:
            at = datetime.fromisoformat(row[_AZURE[0]]).replace(tzinfo=UTC).timestamp()
            yield reader.line_num, dict(zip(_FIELDS, (at, *(int(row[name]) for name in _AZURE[1:])), strict=True))
        except (KeyError, TypeError, ValueError):
            yield reader.line_num, f"no columns {', '.join(_AZURE)} with a time and two numbers"


def _request(row: Any, where: str) -> TraceRequest:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {', '.join(_FIELDS)}, found {_found(row)}")
    names, unit = (_MOONCAKE, _MILLISECOND) if _FIELDS[0] not in row and _MOONCAKE[0] in row else (_FIELDS, 1.0)
    at: Any = row.get(names[0])
    prompt, output = (_length(row, name, where) for name in names[1:])
    if type(at) not in (int, float) or not math.isfinite(at):
        raise DataError(f"{where}: expected a number under {names[0]!r}, found {_found(at)}")
    ids = row.get("hash_ids")
    ids = [] if ids is None else ids
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{where}: expected a list of whole numbers under 'hash_ids', found {_found(ids)}")
    if ids and len(ids) != -(-prompt // BLOCK_TOKENS):
        raise DataError(
            f"{where}: a prompt of {prompt} tokens has {-(-prompt // BLOCK_TOKENS)} blocks of {BLOCK_TOKENS}, "
            f"found {len(ids)} 'hash_ids'"
        )
    return TraceRequest(at * unit, prompt, output, tuple(ids))


def _length(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 1:
        raise DataError(f"{where}: expected a whole number of at least 1 under {name!r}, found {_found(value)}")
    return value


def _found(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60] if not isinstance(value, str) else value[:60]
