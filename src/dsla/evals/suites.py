"""Which tasks a suite is made of. Nothing is measured here."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsla.distill.data import read_documents
from dsla.errors import ConfigError, DataError
from dsla.evals.generation import PROMPTS, generation_tasks, read_prompts
from dsla.evals.haystack import Haystack
from dsla.evals.perplexity import document_windows, first_windows, perplexity_task
from dsla.evals.synthetic import copy_task, key_value_task, multi_needle_task, passkey_task
from dsla.evals.task import Task
from dsla.storage import sha256

COMMONSENSE = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
"""Tasks of the commonsense figure."""

FOLDERS = ("ppl", "mc", "gen", "long", "prompts")
"""Folders of the evaluation data that tasks read."""

_WIKITEXT, _BOOKS = "ppl/wikitext2_valid.txt.gz", "ppl/books_long.jsonl.zst"
_MATH = "gen/gsm8k_test.jsonl.gz"
_PROMPTS = "prompts/mt_vicuna_bench.jsonl.gz"


@dataclass(frozen=True)
class Size:
    """How much a suite reads.

    Attributes:
        books: windows of 8,192 tokens.
        passkey: length in tokens -> items; likewise the others.
        multi_needle: see above.
        key_value: see above.
        copy: see above.
        prompts: chat prompts.
        written: tokens of an answer, at most.
        commonsense: items of each multiple-choice task, None = all.
        knowledge: whether those of knowledge are among them.
        math: items of GSM8K, 0 = not this task.
        long: items of each long task, None = all, 0 = none of these tasks.
    """

    books: int
    passkey: dict[int, int]
    multi_needle: dict[int, int]
    key_value: dict[int, int]
    copy: dict[int, int]
    prompts: int
    written: int
    commonsense: int | None
    knowledge: bool
    math: int
    long: int | None


SIZES = {
    "quick": Size(
        books=2,
        passkey={1024: 10},
        multi_needle={1024: 8},
        key_value={512: 10},
        copy={1024: 4},
        prompts=8,
        written=32,
        commonsense=40,
        knowledge=False,
        math=0,
        long=0,
    ),
    "full": Size(
        books=8,
        passkey={1024: 50, 2048: 50, 4096: 50, 8192: 25},
        multi_needle={1024: 40, 4096: 40},
        key_value={256: 50, 512: 50, 1024: 50, 4096: 25},
        copy={512: 20, 2048: 20, 4096: 20},
        prompts=80,
        written=128,
        commonsense=None,
        knowledge=True,
        math=100,
        long=None,
    ),
}
"""Suite -> its size."""


@dataclass(frozen=True)
class Suite:
    """Tasks to run, and what was left out of them.

    Attributes:
        tasks: in the order they are run in.
        left_out: task or file -> why.
        files: file -> its hash, of all that the tasks were read from.
    """

    tasks: list[Task]
    left_out: dict[str, str]
    files: dict[str, str]


def suite(name: str, data: Path | None, tokenizer: Any, context: int, limit: int | None = None) -> Suite:
    """The tasks of a suite.

    Args:
        name: `quick` or `full`.
        data: folder of the evaluation data (`ppl/`, `mc/`, `long/`, `prompts/`), None = none: only what needs no files.
        tokenizer: the model's; perplexity counts in its tokens.
        context: of the model, in tokens: tasks that need more are left out, by name.
        limit: items of each task, at most.

    Raises:
        ConfigError: there is no such suite, or no such folder.
        DataError: a file is damaged or does not fit its schema.
    """
    if name not in SIZES:
        raise ConfigError(f"there is no suite {name!r}: choose {' or '.join(SIZES)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, found {limit}")
    if data is not None and not any((data / folder).is_dir() for folder in FOLDERS):
        raise ConfigError(f"--data {data} holds none of the folders {', '.join(FOLDERS)}")
    size, left_out = SIZES[name], dict[str, str]()
    tasks = [
        *_perplexity(data, tokenizer, context, size, limit, left_out),
        *_multiple_choice(data, size, limit, left_out),
        *_synthetic(_have(data, _BOOKS, {}), size, limit),
        *_generation(_have(data, _PROMPTS, left_out), size, limit),
        *_math(data, size, limit, left_out),
        *_long(data, tokenizer, context, size, limit, left_out),
    ]
    for task in tasks:
        if task.tokens > context:
            left_out[task.name] = f"it reads {task.tokens:,} tokens at once, the model's context is {context:,}"
    return Suite([task for task in tasks if task.tokens <= context], left_out, _hashes(data))


def choose(found: Suite, patterns: Sequence[str]) -> Suite:
    """Only the tasks whose names are given; `*` stands for any text.

    Raises:
        ConfigError: nothing has such a name.
    """
    names = [task.name for task in found.tasks]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            why = found.left_out.get(pattern)
            raise ConfigError(
                f"task {pattern!r} is left out: {why}" if why else f"no task {pattern!r}: there are {', '.join(names)}"
            )
    chosen = [task for task in found.tasks if any(fnmatch.fnmatch(task.name, pattern) for pattern in patterns)]
    return Suite(chosen, found.left_out, found.files)


def _perplexity(
    data: Path | None, tokenizer: Any, context: int, size: Size, limit: int | None, left_out: dict[str, str]
) -> list[Task]:
    tasks = []
    for name, file, read, count, length in (
        ("wikitext2", _WIKITEXT, first_windows, 8, 1024),
        ("books", _BOOKS, document_windows, size.books, 8192),
    ):
        path = _have(data, file, left_out)
        if path is not None and length > context:
            left_out[f"perplexity/{name}"] = f"its windows have {length:,} tokens, the model's context is {context:,}"
        elif path is not None:
            tasks.append(perplexity_task(name, read(tokenizer, path, _least(count, limit), length)))
    return tasks


def _multiple_choice(data: Path | None, size: Size, limit: int | None, left_out: dict[str, str]) -> list[Task]:
    if data is None or not (data / "mc").is_dir():
        left_out["mc"] = "no such folder was given"
        return []
    from dsla.evals.harness import commonsense_tasks

    tasks: list[Task] = commonsense_tasks(data, _least(limit, size.commonsense))
    if not size.knowledge:
        left_out |= {task.name: "not in this suite" for task in tasks if task.group == "knowledge"}
        tasks = [task for task in tasks if task.group != "knowledge"]
    for name in sorted(set(COMMONSENSE) - {task.name for task in tasks}):
        left_out[name] = "its file is not in mc/"
    return tasks


def _math(data: Path | None, size: Size, limit: int | None, left_out: dict[str, str]) -> list[Task]:
    if size.math == 0:
        left_out["gsm8k"] = "not in this suite"
        return []
    if data is None or _have(data, _MATH, left_out) is None:
        return []
    from dsla.evals.harness import gsm8k_task

    return [gsm8k_task(data, _least(limit, size.math))]


def _long(
    data: Path | None, tokenizer: Any, context: int, size: Size, limit: int | None, left_out: dict[str, str]
) -> list[Task]:
    if size.long == 0:
        left_out["long"] = "not in this suite"
        return []
    if data is None or not (data / "long").is_dir():
        left_out["long"] = "no such folder was given"
        return []
    from dsla.evals.long import long_tasks

    tasks, missing = long_tasks(data, tokenizer, context, _least(limit, size.long))
    left_out |= missing
    return tasks


def _synthetic(books: Path | None, size: Size, limit: int | None) -> list[Task]:
    haystack = Haystack(list(read_documents([books])) if books else ())
    return [
        *(passkey_task(length, _least(items, limit), haystack) for length, items in size.passkey.items()),
        *(multi_needle_task(length, _least(items, limit), haystack) for length, items in size.multi_needle.items()),
        *(key_value_task(length, _least(items, limit)) for length, items in size.key_value.items()),
        *(copy_task(length, _least(items, limit)) for length, items in size.copy.items()),
    ]


def _generation(path: Path | None, size: Size, limit: int | None) -> list[Task]:
    count = _least(size.prompts, limit)
    prompts = PROMPTS if path is None else read_prompts(path)
    # Spread over the file, whose neighbours are of one kind.
    step = max(1, len(prompts) // count)
    return generation_tasks(list(prompts)[::step][:count], size.written)


def _have(data: Path | None, file: str, left_out: dict[str, str]) -> Path | None:
    """A file of the data; where it is not there, that is said."""
    path = None if data is None else data / file
    if path is not None and path.is_file():
        return path
    left_out[file] = "it was not given" if data is None else "it is not in the data folder"
    return None


def _least(limit: int | None, other: Any) -> Any:
    given = [x for x in (limit, other) if x is not None]
    return min(given) if given else None


def _hashes(data: Path | None) -> dict[str, str]:
    if data is None:
        return {}
    files = sorted(file for folder in FOLDERS for file in (data / folder).glob("*") if file.is_file())
    try:
        return {str(file.relative_to(data)): sha256(file) for file in files}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
