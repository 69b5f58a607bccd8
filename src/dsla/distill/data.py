"""Training text: files to documents, documents to windows of tokens."""

from __future__ import annotations

import gzip
import heapq
import io
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dsla.errors import DataError

_CHARS_PER_TOKEN = 6
_MOST_CHARS_PER_TOKEN = 32
_TOKENIZED_AT_ONCE = 64
_CHUNK_BYTES = 1 << 20


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `read_documents` reads, in its order.

    Args:
        paths: `.txt` and `.jsonl` files, plain, `.gz` or `.zst`, or folders whose files of these types are taken in name order.

    Raises:
        DataError: if a path is not there or of another type, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _inside(path)
        elif not path.exists():
            raise DataError(f"no training data at {path}")
        elif not _is_text(path):
            raise DataError(f"{path}: expected .txt or .jsonl, optionally .gz or .zst")
        else:
            files.append(path)
    return files


def read_documents(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of `.txt` (a file is a document) and `.jsonl` (a line is one, key `text`) files.

    Args:
        paths: as for `text_files`.

    Raises:
        DataError: as `text_files`, or if a file is damaged or binary, or a line is no JSON with a text.
    """
    for path in text_files(paths):
        kind = path.name.removesuffix(".gz").removesuffix(".zst")
        try:
            with _open(path) as file:
                if kind.endswith(".txt"):
                    yield _not_binary(file.read(), path)
                    continue
                for number, line in enumerate(file, 1):
                    if _not_binary(line, path).strip():
                        yield _text(line, path, number)
        except UnicodeDecodeError:
            raise DataError(f"{path} is binary or not UTF-8 text") from None
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"cannot read {path}: {error}") from None


def token_windows(tokenizer: Any, documents: Iterator[str], seq_len: int, count: int, seed: int) -> Tensor:
    """`count` windows of `seq_len` tokens, drawn from all documents.

    Documents are cut into pieces of about a window and shuffled. A piece gives as many whole windows as it fills, so that long
    documents give long contexts; what is left over and shorter pieces are joined, an end-of-text token after each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: texts.
        seq_len: tokens a window.
        count: windows.
        seed: of the shuffle.

    Returns:
        Token ids `[count, seq_len]` int64.

    Raises:
        DataError: if the documents are empty or too short for `count` windows, or the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer names no end-of-text token to put between documents: set its eos_token")
    pieces = _drawn(documents, seq_len * _CHARS_PER_TOKEN, count * seq_len * _MOST_CHARS_PER_TOKEN, seed)
    if not pieces:
        raise DataError("the training data is empty")
    windows: list[list[int]] = []
    rest: list[int] = []
    for start in range(0, len(pieces), _TOKENIZED_AT_ONCE):
        for ids in tokenizer(pieces[start : start + _TOKENIZED_AT_ONCE], add_special_tokens=False)["input_ids"]:
            whole = len(ids) - len(ids) % seq_len
            windows += [ids[i : i + seq_len] for i in range(0, whole, seq_len)]
            if whole < len(ids):
                rest += [*ids[whole:], end]
            if len(rest) >= seq_len:
                windows.append(rest[:seq_len])
                rest = rest[seq_len:]
        if len(windows) >= count:
            return torch.tensor(windows[:count])
    found = len(windows) * seq_len + len(rest)
    raise DataError(
        f"the training data holds {found} tokens, the recipe needs {count * seq_len}: give more data or lower its tokens"
    )


def _drawn(documents: Iterator[str], size: int, enough: int, seed: int) -> list[str]:
    """Pieces of `size` characters in random order; of a corpus of more than `enough` characters, that many of them.

    Every piece draws a place in the order, and only the first ones are kept, so a large corpus does not have to fit in memory.
    """
    places, kept, total = random.Random(seed), list[tuple[float, str]](), 0
    for text in documents:
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            if not piece.strip():
                continue
            heapq.heappush(kept, (-places.random(), piece))
            total += len(piece)
            while total - len(kept[0][1]) >= enough:
                total -= len(heapq.heappop(kept)[1])
    return [piece for _, piece in sorted(kept, reverse=True)]


def _inside(folder: Path) -> list[Path]:
    try:
        files = [file for file in sorted(folder.iterdir()) if _is_text(file) and file.is_file()]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from None
    if not files:
        raise DataError(f"{folder} holds no .txt or .jsonl files")
    return files


def _is_text(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith((".txt", ".jsonl"))


def _open(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.name.endswith(".zst"):
        return io.TextIOWrapper(io.BufferedReader(_Stream(_zstd_chunks(path)), _CHUNK_BYTES), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    # The library's own reader takes a file that stops in the middle of a frame for a whole one.
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                while chunk:
                    frame = decompressor.decompressobj() if frame.eof else frame
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data
    except zstandard.ZstdError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not frame.eof:
        raise DataError(f"cannot read {path}: it ends in the middle of a zstd frame")


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _not_binary(text: str, path: Path) -> str:
    if "\0" in text:
        raise DataError(f"{path} is binary or not UTF-8 text: it holds zero bytes")
    return text


def _text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"{path}, line {number}: expected an object with a string under 'text'")
    try:
        record["text"].encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}, line {number}: the text holds half a surrogate pair") from None
    return str(record["text"])
