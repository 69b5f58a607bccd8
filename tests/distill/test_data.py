"""Training text: which files are read, and what is said of those that cannot be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import zstandard

from dsla.distill.data import read_documents, token_windows
from dsla.errors import DataError
from tests.distill.tiny import TinyTokenizer


def test_reads_every_format(tmp_path: Path) -> None:
    line = json.dumps({"text": "two"}) + "\n\n" + json.dumps({"text": "three", "n": 1}) + "\n"
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(line)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(line.encode()))
    assert list(read_documents([tmp_path])) == ["one", "two", "three", "two", "three", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\x00\x81", "binary"),
        ("a.jsonl", b'{"text": 1}\n', "line 1: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{\n', "line 2: not JSON"),
        ("a.jsonl", b"[]\n", "line 1: expected an object"),
        ("a.parquet", b"", "expected .txt or .jsonl"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl.zst", b"no zstd", "cannot read"),
        ("a.txt.gz", gzip.compress(b"hello there")[:-6], "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / name]))


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training data at"):
        list(read_documents([tmp_path / "nothing"]))
    with pytest.raises(DataError, match="holds no"):
        list(read_documents([tmp_path]))


def test_windows_are_full_seeded_and_long_documents_stay_whole() -> None:
    documents = ["a" * 100, "b" * 7, "c" * 9, "d" * 60]
    windows = token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=1)
    assert windows.shape == (4, 10)
    assert torch.equal(windows, token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=1))
    whole = [row for row in windows if len(set(row.tolist())) == 1]
    assert whole, "a document longer than a window gives windows of its own"


@pytest.mark.parametrize("documents", [[], ["", "  \n"]])
def test_no_text_is_an_error(documents: list[str]) -> None:
    with pytest.raises(DataError, match="empty"):
        token_windows(TinyTokenizer(), iter(documents), 10, 1, seed=0)


def test_too_little_text_says_how_much_is_there() -> None:
    with pytest.raises(DataError, match="about 4 tokens, the recipe needs 100"):
        token_windows(TinyTokenizer(), iter(["abc"]), 10, 10, seed=0)
