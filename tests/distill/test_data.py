"""Training text: which files are read, and what is said of those that cannot be."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
import zstandard

from dsla.distill import data
from dsla.distill.data import read_documents, text_files, token_windows
from dsla.errors import DataError
from tests.distill.tiny import TinyTokenizer

TEXT = random.Random(0).randbytes(4000).hex().encode()
JSONL = json.dumps({"text": TEXT.decode()}).encode() + b"\n"


def test_reads_every_format(tmp_path: Path) -> None:
    line = json.dumps({"text": "two"}) + "\n\n" + json.dumps({"text": "three", "n": 1}) + "\n"
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(line)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(line.encode()))
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "tw') + zstandard.compress(b'o"}\n'))
    (tmp_path / "f.txt").write_bytes("\ufeffsix 漢\r\n".encode())
    (tmp_path / "g.md").write_text("not text for training")
    (tmp_path / "h.txt").mkdir()
    expected = ["one", "two", "three", "two", "three", "two", "three", "two", "six 漢\n"]
    assert list(read_documents([tmp_path])) == expected
    names = ["a.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.jsonl.zst", "f.txt"]
    assert text_files([tmp_path]) == [tmp_path / name for name in names]
    assert text_files([tmp_path / "f.txt", tmp_path / "b.jsonl"]) == [tmp_path / "f.txt", tmp_path / "b.jsonl"]


def test_large_zst_files_are_read_piece_by_piece(tmp_path: Path) -> None:
    lines = [f"{i} " + "x" * (i % 977) for i in range(8000)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    assert list(read_documents([tmp_path / "a.jsonl.zst"])) == lines


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
        ("a.txt.gz", gzip.compress(bytes(range(48, 122)) * 9)[:12] + b"\xff" * 40, "cannot read"),
        ("a.txt.zst", zstandard.compress(TEXT)[:-20], "middle of a zstd frame"),
        ("a.jsonl.zst", zstandard.compress(JSONL) + zstandard.compress(JSONL)[:-20], "middle of a zstd frame"),
        ("a.txt.zst", b"", "middle of a zstd frame"),
        ("a.txt", b"text, then zeros\0\0", "binary"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\0"}\n', "binary"),
        ("a.txt", "plain text".encode("utf-16"), "binary"),
        ("a.txt", "plain text".encode("utf-16-le"), "binary"),
        ("a.jsonl", b'{"text": "half \\ud83d"}\n', "line 1: .* surrogate"),
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


def test_windows_are_full_and_seeded() -> None:
    documents = ["a" * 100, "b" * 7, "c" * 9, "d" * 60]
    windows = token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=1)
    assert windows.shape == (4, 10)
    assert torch.equal(windows, token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=1))
    assert not torch.equal(windows, token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=2))


def test_every_token_is_used_and_long_documents_give_whole_windows() -> None:
    documents = ["a" * 47, "b" * 7, "c" * 9, "d" * 65]
    windows = token_windows(TinyTokenizer(), iter(documents), 10, 12, seed=1)
    counts = {text[0]: int((windows == ord(text[0])).sum()) for text in documents}
    # 128 tokens of text and 5 of ends (two short documents, the tail of `a`, a whole piece and a tail of `d`): 13 of 120 left.
    assert sum(counts.values()) + int((windows == 0).sum()) == 120
    assert 128 - sum(counts.values()) <= 13
    whole = [row for row in windows.tolist() if len(set(row)) == 1]
    assert sum(row[0] == ord("a") for row in whole) == 4 and sum(row[0] == ord("d") for row in whole) == 6


def test_only_what_is_wanted_of_a_large_corpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    drawn = data._drawn
    monkeypatch.setattr(data, "_drawn", lambda *args: kept.append(len(pieces := drawn(*args))) or pieces)
    documents = [chr(97 + i % 26) * 60 for i in range(2600)]
    windows = token_windows(TinyTokenizer(), iter(documents), 10, 100, seed=0)
    assert kept[0] == 534, "32,000 characters of 60 a piece"
    letters = {row[0] for row in windows.tolist()}
    assert len(letters) > 10, "the windows come from all over the corpus"


def test_tokenizer_without_an_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyTokenizer, "eos_token_id", None)
    with pytest.raises(DataError, match="names no end-of-text token"):
        token_windows(TinyTokenizer(), iter(["abc"]), 2, 1, seed=0)


@pytest.mark.parametrize("documents", [[], ["", "  \n"]])
def test_no_text_is_an_error(documents: list[str]) -> None:
    with pytest.raises(DataError, match="empty"):
        token_windows(TinyTokenizer(), iter(documents), 10, 1, seed=0)


def test_too_little_text_says_how_much_is_there() -> None:
    with pytest.raises(DataError, match="holds 4 tokens, the recipe needs 100"):
        token_windows(TinyTokenizer(), iter(["abc"]), 10, 10, seed=0)
    with pytest.raises(DataError, match="holds 100 tokens, the recipe needs 110"):
        token_windows(TinyTokenizer(), iter(["a" * 55, "b" * 43]), 10, 11, seed=0)
