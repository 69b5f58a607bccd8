"""Files of text: which there are, and how they are opened. What is in them is the business of `records`."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from dsla.errors import DataError

_CHUNK_BYTES = 1 << 20
_PACKED = (".gz", ".zst")
_KINDS = {".txt": _PACKED, ".jsonl": _PACKED, ".parquet": ()}
_EXPECTED = ".txt or .jsonl, optionally .gz or .zst, or .parquet"


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `read_documents` reads, in its order.

    Args:
        paths: `.txt` and `.jsonl` files, plain, `.gz` or `.zst`, `.parquet` files, or folders whose files of these types are
            taken in name order.

    Raises:
        DataError: if a path is not there or of another type, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _inside(path)
        elif not path.exists():
            raise DataError(f"no training data at {path}")
        elif kind_of(path) is None:
            raise DataError(f"{path}: expected {_EXPECTED}")
        else:
            files.append(path)
    return files


def kind_of(path: Path) -> str | None:
    """`.txt`, `.jsonl` or `.parquet`; None of a file of another type."""
    for kind, packed in _KINDS.items():
        if path.name.endswith((kind, *(kind + suffix for suffix in packed))):
            return kind
    return None


def open_text(path: Path) -> TextIO:
    """Opens a `.txt` or `.jsonl` file, packed or not, as UTF-8."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.name.endswith(".zst"):
        return io.TextIOWrapper(io.BufferedReader(_Stream(_zstd_chunks(path)), _CHUNK_BYTES), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _inside(folder: Path) -> list[Path]:
    try:
        files = [file for file in sorted(folder.iterdir()) if kind_of(file) and file.is_file()]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from None
    if not files:
        raise DataError(f"{folder} holds no {_EXPECTED} files")
    return files


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
