"""The verb `demo`, in this process, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dsla.bench import streams as streams_module
from dsla.bench.streams import Book
from dsla.cli.app import build
from dsla.convert import Plan
from dsla.convert.adapter import FORMAT
from dsla.engine import PackedDecoder
from dsla.errors import AdapterError, ConfigError
from dsla.storage import write_json

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture
def short_books(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick brown fox jumps over the lazy dog, again and again.\n"
    books = [Book(f"Book {i}", "A", "s", "c", "l", 0, text * (10 + 3 * i)) for i in range(8)]
    monkeypatch.setattr(streams_module, "load_books", lambda: books)


def dsla(*arguments: str) -> Result:
    return CliRunner().invoke(build(["demo", "generate"]), ["demo", *arguments])


@pytest.mark.usefixtures("short_books")
def test_demo_tells_what_happens_and_writes_it_down(folders: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = dsla("--model", folders[0], "--adapter", folders[1], "--out", str(out), "--max-tokens", "6")
    assert result.exit_code == 0, result.output
    for text in ("does not hold that", "memory short:", "All 8 streams finished", "48 written", "Conversions:"):
        assert text in result.stdout
    data = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert len(data["streams"]) == 8 and data["samples"]
    assert (out / "demo.png").stat().st_size > 10_000


@pytest.mark.usefixtures("short_books")
def test_demo_says_so_where_nothing_had_to_be_converted(folders: tuple[str, str], tmp_path: Path) -> None:
    arguments = ("--memory", "64MiB", "--streams", "1", "--max-tokens", "2")
    result = dsla("--model", folders[0], "--adapter", folders[1], "--out", str(tmp_path), *arguments)
    assert result.exit_code == 0, result.output
    assert "Conversions: none" in result.stdout and "All 1 stream finished" in result.stdout


@pytest.mark.usefixtures("short_books")
def test_demo_fails_where_a_stream_fails(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: PackedDecoder, batch: object, arena: object) -> torch.Tensor:
        return torch.full((len(batch.sample_rows), self.vocab_size), torch.nan)  # type: ignore[attr-defined]

    monkeypatch.setattr(PackedDecoder, "forward", broken)
    result = dsla("--model", folders[0], "--adapter", folders[1], "--out", str(tmp_path), "--streams", "2")
    assert result.exit_code == 1
    assert "2 of 2 streams did not finish: Book 0 (request '0': logits are not finite" in result.stdout


def test_demo_needs_an_adapter(folders: tuple[str, str], tmp_path: Path) -> None:
    result = dsla("--model", folders[0], "--out", str(tmp_path))
    assert isinstance(result.exception, AdapterError)
    assert "needs an adapter" in str(result.exception) and "dsla convert" in str(result.exception)


def test_demo_needs_an_adapter_with_layers(folders: tuple[str, str], tmp_path: Path) -> None:
    Plan.load(Path(folders[1]) / "plan.json").save(tmp_path / "plan.json")
    write_json(tmp_path / "manifest.json", {"format": FORMAT, "layers": {}})
    result = dsla("--model", folders[0], "--adapter", str(tmp_path), "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, AdapterError)
    assert "holds no converted layer yet" in str(result.exception)


def test_demo_names_a_context_that_is_too_short(folders: tuple[str, str], tmp_path: Path) -> None:
    result = dsla("--model", folders[0], "--adapter", folders[1], "--out", str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert "context is 4,096 tokens" in str(result.exception)


@pytest.mark.usefixtures("short_books")
def test_demo_names_a_budget_that_is_too_small(folders: tuple[str, str], tmp_path: Path) -> None:
    result = dsla("--model", folders[0], "--adapter", folders[1], "--out", str(tmp_path), "--memory", "20KiB")
    assert isinstance(result.exception, ConfigError)
    assert "20,480 bytes is too small for the demo" in str(result.exception)


def test_demo_finds_an_unusable_folder_before_it_loads_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = dsla("--model", "/no/such/model", "--out", str(tmp_path / "file"))
    assert isinstance(result.exception, ConfigError)
    assert "cannot be written to" in str(result.exception)
