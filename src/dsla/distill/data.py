"""Training text: files to documents, documents to windows of tokens."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dsla.errors import DataError

_CHARS_PER_TOKEN = 6


def read_documents(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of `.txt` (a file is a document) and `.jsonl` (a line is one, key `text`) files, plain, `.gz` or `.zst`.

    Args:
        paths: files, or folders whose files of these types are read in name order.

    Raises:
        DataError: if a path is not there, of another type, binary, or a line is no JSON with a text.
    """
    for path in _files(paths):
        kind = path.name.removesuffix(".gz").removesuffix(".zst")
        try:
            with _open(path) as file:
                if kind.endswith(".txt"):
                    yield file.read()
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text(line, path, number)
        except UnicodeDecodeError:
            raise DataError(f"{path} is binary or not UTF-8 text") from None
        except (EOFError, OSError) as error:
            raise DataError(f"cannot read {path}: {error}") from None


def token_windows(tokenizer: Any, documents: Iterator[str], seq_len: int, count: int, seed: int) -> Tensor:
    """`count` windows of `seq_len` tokens, drawn from all documents.

    Documents are cut into pieces of about a window and shuffled. A piece that fills a window is one by itself, so that long
    documents give long contexts; shorter ones are joined, an end-of-text token between them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: texts.
        seq_len: tokens a window.
        count: windows.
        seed: of the shuffle.

    Returns:
        Token ids `[count, seq_len]` int64.

    Raises:
        DataError: if the documents are empty or too short for `count` windows.
    """
    size = seq_len * _CHARS_PER_TOKEN
    pieces = [text[i : i + size] for text in documents for i in range(0, len(text), size) if text[i : i + size].strip()]
    if not pieces:
        raise DataError("the training data is empty")
    random.Random(seed).shuffle(pieces)
    windows: list[list[int]] = []
    rest: list[int] = []
    for start in range(0, len(pieces), 64):
        for ids in tokenizer(pieces[start : start + 64], add_special_tokens=False)["input_ids"]:
            if len(ids) >= seq_len:
                windows.append(ids[:seq_len])
                continue
            rest += [*ids, tokenizer.eos_token_id]
            while len(rest) >= seq_len:
                windows.append(rest[:seq_len])
                rest = rest[seq_len:]
        if len(windows) >= count:
            return torch.tensor(windows[:count])
    found = len(windows) * seq_len + len(rest)
    raise DataError(
        f"the training data holds about {found} tokens, the recipe needs {count * seq_len}: give more data or lower its tokens"
    )


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if _is_text(file)]
            if not inside:
                raise DataError(f"{path} holds no .txt or .jsonl files")
            yield from inside
        elif not path.exists():
            raise DataError(f"no training data at {path}")
        elif not _is_text(path):
            raise DataError(f"{path}: expected .txt or .jsonl, optionally .gz or .zst")
        else:
            yield path


def _is_text(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith((".txt", ".jsonl"))


def _open(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    if path.name.endswith(".zst"):
        import zstandard

        try:
            return io.TextIOWrapper(
                io.BytesIO(zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()), encoding="utf-8"
            )
        except zstandard.ZstdError as error:
            raise DataError(f"cannot read {path}: {error}") from None
    return open(path, encoding="utf-8")


def _text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"{path}, line {number}: expected an object with a string under 'text'")
    return str(record["text"])
