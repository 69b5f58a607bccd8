"""Windows of equal length."""

from __future__ import annotations

import pytest
import torch

from dsla.distill.data import said_twice, token_windows, windows
from dsla.errors import DataError
from tests.distill.tiny import TinyTokenizer


def test_windows_are_full_and_seeded() -> None:
    documents = ["a" * 100, "b" * 7, "c" * 9, "d" * 60]
    found = token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=1)
    assert found.shape == (4, 10) and found.dtype == torch.int64
    assert torch.equal(found, token_windows(TinyTokenizer(), reversed(documents), 10, 4, seed=1))
    seeds = [token_windows(TinyTokenizer(), iter(documents), 10, 4, seed=seed).tolist() for seed in range(5)]
    assert any(other != found.tolist() for other in seeds)


def test_a_window_is_of_one_document_as_long_as_documents_are_long_enough() -> None:
    documents = [chr(97 + i) * 30 for i in range(5)] + ["xyz"] * 50
    found = token_windows(TinyTokenizer(), iter(documents), 10, 15, seed=1)
    assert all(len(set(row)) == 1 for row in found.tolist())


def test_every_token_is_used_before_there_are_too_few() -> None:
    documents = ["a" * 47, "b" * 7, "c" * 9, "d" * 65]
    # 128 tokens; four whole windows of a, six of d; left are 7, 7, 9 and 5, each with an end.
    found = token_windows(TinyTokenizer(), iter(documents), 10, 13, seed=1)
    counts = {text[0]: int((found == ord(text[0])).sum()) for text in documents}
    assert sum(counts.values()) + int((found == 0).sum()) == 130
    whole = [row for row in found.tolist() if len(set(row)) == 1]
    assert sum(row[0] == ord("a") for row in whole) == 4 and sum(row[0] == ord("d") for row in whole) == 6


def test_only_what_is_wanted_of_a_large_corpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    draw = windows.draw_pieces
    monkeypatch.setattr(windows, "draw_pieces", lambda *args: kept.append(len(pieces := draw(*args))) or pieces)
    documents = [f"{i:04d}{chr(97 + i % 26)}" * 12 for i in range(2600)]
    found = token_windows(TinyTokenizer(), iter(documents), 10, 100, seed=0)
    assert kept[0] == 534, "32,000 characters of 60 a piece"
    assert len({row[-1] for row in found.tolist()}) > 10, "the windows come from all over the corpus"


def test_tokenizer_without_an_end_is_named_where_documents_must_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyTokenizer, "eos_token_id", None)
    assert token_windows(TinyTokenizer(), iter(["abcd"]), 2, 2, seed=0).tolist() == [[97, 98], [99, 100]]
    with pytest.raises(DataError, match="names no end-of-text token"):
        token_windows(TinyTokenizer(), iter(["abc"]), 2, 2, seed=0)


@pytest.mark.parametrize("documents", [[], ["", "  \n"]])
def test_no_text_is_an_error(documents: list[str]) -> None:
    with pytest.raises(DataError, match="empty"):
        token_windows(TinyTokenizer(), iter(documents), 10, 1, seed=0)


def test_too_little_text_says_how_much_is_there() -> None:
    with pytest.raises(DataError, match="holds 4 tokens, the recipe needs 100"):
        token_windows(TinyTokenizer(), iter(["abc"]), 10, 10, seed=0)
    with pytest.raises(DataError, match="holds 100 tokens, the recipe needs 110"):
        token_windows(TinyTokenizer(), iter(["a" * 55, "b" * 43]), 10, 11, seed=0)


@pytest.mark.parametrize(("length", "expected"), [(6, [0, 1, 2, 0, 1, 2]), (5, [0, 1, 2, 0, 1]), (1, [0])])
def test_said_twice(length: int, expected: list[int]) -> None:
    windows = torch.stack([torch.arange(length), torch.arange(length) + 10])
    assert said_twice(windows).tolist() == [expected, [token + 10 for token in expected]]
