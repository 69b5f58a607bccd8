"""Files and records: which are read, how conversations become text, and what is said of those that cannot be."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from jinja2 import TemplateError
from pyarrow import parquet

from dsla.distill.data import read_documents, text_files
from dsla.errors import DataError

TEXT = random.Random(0).randbytes(4000).hex().encode()
JSONL = json.dumps({"text": TEXT.decode()}).encode() + b"\n"
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


class ChatTokenizer:
    """Renders messages as `role: content`."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        if messages[0]["role"] != "user":
            raise TemplateError("the first message must be the user's")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


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
    write_parquet(tmp_path / "i.parquet", text=["seven", "eight", "nine"], n=[7, 8, 9])
    expected = ["one", "two", "three", "two", "three", "two", "three", "two", "six 漢\n", "seven", "eight", "nine"]
    assert list(read_documents([tmp_path])) == expected
    names = ["a.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.jsonl.zst", "f.txt", "i.parquet"]
    assert text_files([tmp_path]) == [tmp_path / name for name in names]


def test_long_zst_files_are_read_whole(tmp_path: Path) -> None:
    lines = [random.Random(i).randbytes(200_000).hex() for i in range(12)]
    whole = b"".join(json.dumps({"text": line}).encode() + b"\n" for line in lines)
    (tmp_path / "long.jsonl.zst").write_bytes(zstandard.compress(whole))
    assert list(read_documents([tmp_path])) == lines


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    shown = "user: Why?\nassistant: Because.\n"
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in ({"messages": CHAT}, {"text": "one", "messages": CHAT}))
    )
    write_parquet(tmp_path / "b.parquet", messages=[CHAT, CHAT[:1], None], text=[None, "two", "three"])
    found = list(read_documents([tmp_path], ChatTokenizer()))
    assert found == [shown, shown, shown, "user: Why?\n", "three"]


@pytest.mark.parametrize(
    ("tokenizer", "message"), [(None, "no tokenizer here"), (object(), "the tokenizer has no chat template")]
)
def test_messages_without_a_template_are_named_and_texts_beside_them_are_read(
    tokenizer: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / "both.jsonl").write_text(json.dumps({"text": "one", "messages": CHAT}))
    assert list(read_documents([tmp_path], tokenizer)) == ["one"]
    (tmp_path / "chat.jsonl").write_text("\n" + json.dumps({"messages": CHAT}))
    with pytest.raises(DataError, match=rf"chat\.jsonl, line 2: 'messages' need a chat template and .*{message}"):
        list(read_documents([tmp_path / "chat.jsonl"], tokenizer))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list .* found nothing"),
        ("hello", "expected a list .* found str"),
        ([{"role": "user"}], "message 0 needs a string under 'content', found nothing"),
        ([*CHAT, {"role": "user", "content": ["x"]}], "message 2 needs a string under 'content', found list"),
        ([{"content": "x"}], "message 0 needs a string under 'role', found nothing"),
        (["x"], "message 0 must be {role, content}, found str"),
        (CHAT[1:], "the chat template refuses the messages: the first message"),
        ([{"role": "user", "content": "half \ud83d"}], "half a surrogate pair"),
    ],
)
def test_bad_messages_are_named(messages: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=rf"chat\.jsonl, line 2: .*{message}"):
        list(read_documents([path], ChatTokenizer()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\x00\x81", "binary"),
        ("a.jsonl", b'{"text": 1}\n', "line 1: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{\n', "line 2: not JSON"),
        ("a.jsonl", b"[]\n", "line 1: expected an object"),
        ("a.csv", b"", r"expected \.txt or \.jsonl, .* or \.parquet"),
        ("a.parquet.gz", b"", r"expected \.txt or \.jsonl"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl.zst", b"no zstd", "cannot read"),
        ("a.parquet", b"no parquet", "cannot read"),
        ("a.parquet", b"", "cannot read"),
        ("a.txt.gz", gzip.compress(b"hello there", mtime=0)[:-6], "cannot read"),
        ("a.txt.gz", gzip.compress(bytes(range(48, 122)) * 9, mtime=0)[:12] + b"\xff" * 40, "cannot read"),
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


def test_bad_parquet_columns_and_rows_are_named(tmp_path: Path) -> None:
    other = write_parquet(tmp_path / "other.parquet", content=["x"], n=[1])
    with pytest.raises(DataError, match="expected a column 'text' or 'messages', found content, n"):
        list(read_documents([other]))
    empty = write_parquet(tmp_path / "empty.parquet", text=["x", "y", "z", None])
    with pytest.raises(DataError, match=r"empty\.parquet, row 4: expected an object with a string under 'text'"):
        list(read_documents([empty]))
    whole = write_parquet(tmp_path / "cut.parquet", text=["x" * 1000]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot read"):
        list(read_documents([tmp_path / "cut.parquet"]))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'dsla\[parquet\]'"):
        list(read_documents([path]))


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training data at"):
        list(read_documents([tmp_path / "nothing"]))
    with pytest.raises(DataError, match="holds no"):
        list(read_documents([tmp_path]))
