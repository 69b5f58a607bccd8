"""Sources: how the command line names them, what their weights mean, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsla.distill.data import Source, TeacherText, check_sources, mixed_windows, mixture, parse_source, training_batches
from dsla.distill.data.vocabulary import check_tokenizer, check_tokens
from dsla.distill.recipe import DataSettings
from dsla.errors import DataError
from tests.distill.tiny import TinyTokenizer, teacher


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two sources of their own letter, six documents each."""
    monkeypatch.chdir(tmp_path)
    for letter in "ab":
        (tmp_path / letter).mkdir()
        for i in range(6):
            (tmp_path / letter / f"{i}.txt").write_text(letter * (2000 + i))
    (tmp_path / "x=0.5.txt").write_text("x")
    (tmp_path / "y.txt=2").write_text("y")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a", Source(Path("a"))),
        ("a=0.25", Source(Path("a"), 0.25)),
        ("a=3", Source(Path("a"), 3.0)),
        ("x=0.5.txt", Source(Path("x=0.5.txt"))),
        ("x=0.5.txt=2", Source(Path("x=0.5.txt"), 2.0)),
        ("y.txt=2", Source(Path("y.txt=2"))),
        ("nowhere.txt", Source(Path("nowhere.txt"))),
        ("teacher:1000", TeacherText(1000)),
        ("teacher:2_000_000=0.5", TeacherText(2_000_000, 0.5)),
    ],
)
def test_command_line(text: str, source: object, folder: Path) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=0", "'0' is no weight"),
        ("a=-1", "'-1' is no weight"),
        ("a=nan", "'nan' is no weight"),
        ("a=inf", "'inf' is no weight"),
        ("a=", "'' is no weight"),
        ("nowhere=b.txt", "no such file, and 'b.txt' is no weight"),
        ("teacher:", "whole number of tokens, found ''"),
        ("teacher:many", "whole number of tokens, found 'many'"),
        ("teacher:0", "whole number of tokens, found '0'"),
        ("teacher:1.5", "whole number of tokens, found '1.5'"),
    ],
)
def test_bad_command_lines_are_named(text: str, message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        parse_source(text)


def test_what_is_refused_before_anything_is_read(folder: Path) -> None:
    a, b, nowhere = Source(Path("a"), 1.0), Source(Path("b")), Source(Path("nowhere"))
    for sources, tokens, message in [
        ([], 0, "no training data is given"),
        ([a, b], 0, "b has no weight, but other data has"),
        ([a, TeacherText(10)], 0, "teacher:10 has no weight"),
        ([b, nowhere], 0, "no training data at nowhere"),
        ([TeacherText(10), TeacherText(20)], 0, "given twice"),
        ([TeacherText(99)], 100, "needs 100 tokens of the teacher, --data asks for teacher:99"),
        ([TeacherText(49, 1.0), a], 100, "needs 50 tokens of the teacher"),
    ]:
        with pytest.raises(DataError, match=message):
            check_sources(sources, tokens)
    check_sources([TeacherText(100)], 100)
    check_sources([TeacherText(50, 1.0), a], 100)
    check_sources([TeacherText(1), b], 100)


def test_weights_are_shares_of_the_tokens(folder: Path) -> None:
    sources = [Source(Path("a"), 3.0), Source(Path("b"), 1.0)]
    assert [share for share, _ in mixture(sources)] == [0.75, 0.25]
    text = training_batches(TinyTokenizer(), sources, DataSettings(128, 4096, 512), 256, seed=0)
    for batches, tokens in ((text.train, 4096), (text.valid, 512)):
        ids = torch.cat([batch.flatten() for batch in batches])
        assert len(ids) == tokens and int((ids == ord("a")).sum()) == 0.75 * tokens
    windows = mixed_windows(TinyTokenizer(), sources, 128, 8, seed=0)
    assert sorted(windows[:, 0].tolist()) == [ord("a")] * 6 + [ord("b")] * 2
    assert len({tuple(row) for row in windows.tolist()}) == 2, "no window mixes documents"


def test_without_weights_documents_count_alike(folder: Path) -> None:
    (folder / "a" / "long.txt").write_text("a" * 50_000)
    sources = [Source(Path("b")), Source(Path("a"))]
    ids = torch.cat(
        [x.flatten() for x in training_batches(TinyTokenizer(), sources, DataSettings(128, 16384, 512), 256, 0).train]
    )
    assert 0.7 < float((ids == ord("a")).double().mean()) < 0.95, "of 74,000 characters 62,000 are a"


def test_a_document_of_an_earlier_source_is_not_used_again(folder: Path) -> None:
    sources = [Source(Path("a"), 1.0), Source(Path("a/0.txt"), 1.0)]
    with pytest.raises(DataError, match=r"every document of a/0\.txt is in the data named before it"):
        training_batches(TinyTokenizer(), sources, DataSettings(128, 8192, 512), 256, seed=0)


def test_tokenizer_of_another_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tokenizer(TinyTokenizer(), teacher())
    monkeypatch.setattr(TinyTokenizer, "__len__", lambda self: 129)
    with pytest.raises(DataError, match="the tokenizer has 129 tokens, the model's embedding 128"):
        check_tokenizer(TinyTokenizer(), teacher())
    check_tokens([torch.tensor([[127]])], teacher())
    with pytest.raises(DataError, match="made token 128, the model's embedding ends at 127"):
        check_tokens([torch.tensor([[3]]), torch.tensor([[128, 4]])], teacher())
