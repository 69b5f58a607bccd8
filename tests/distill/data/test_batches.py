"""Packing: rows are pieces of one document, nothing is read twice, and nearly nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsla.convert.load import load_tokenizer
from dsla.distill.data import Source, TrainingText, batches, training_batches
from dsla.distill.data.batches import pack
from dsla.distill.data.split import row_tokens
from dsla.distill.recipe import DataSettings
from dsla.errors import DataError

FIRST = 0x10000
"""Documents are made of characters from here on, no two alike: a token says which document it is of, and where in it."""

DATA = Path(__file__).parents[4] / "shared" / "data" / "train"


class Letters:
    """A token a character, whatever it is."""

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def documents_of(lengths: Sequence[int]) -> list[str]:
    ends = np.cumsum(lengths).tolist()
    return ["".join(map(chr, range(FIRST + end - n, FIRST + end))) for n, end in zip(lengths, ends, strict=True)]


def text_of(
    lengths: Sequence[int], asked: DataSettings, batch_tokens: int, seed: int, patch: pytest.MonkeyPatch
) -> TrainingText:
    documents = documents_of(lengths)

    def read(paths: Sequence[Path], tokenizer: Any) -> Iterator[str]:
        yield from documents

    patch.setattr(batches, "read_documents", read)
    return training_batches(Letters(), [Source(Path("text"))], asked, batch_tokens, seed)


def tokens_in(batches: Sequence[Tensor]) -> list[int]:
    return [token for batch in batches for token in batch.flatten().tolist()]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=3, max_size=40),
    seq_len=st.sampled_from([32, 64, 100, 256, 512]),
    rows=st.sampled_from([1, 2, 3, 8]),
    share=st.floats(0.1, 0.7),
    seed=st.integers(0, 5),
)
@example(lengths=[2116, 1, 2116], seq_len=512, rows=1, share=0.125, seed=0)
@example(lengths=[2116, 64, 2116], seq_len=512, rows=1, share=0.125, seed=0)
def test_rows_are_pieces_of_one_document_and_none_is_read_twice(
    lengths: list[int], seq_len: int, rows: int, share: float, seed: int
) -> None:
    usable = [row_tokens(length, seq_len) for length in lengths]
    train = int(sum(usable) * share)
    asked = DataSettings(seq_len, train, seq_len)
    batch_tokens = seq_len * rows
    with pytest.MonkeyPatch.context() as patch:
        try:
            text = text_of(lengths, asked, batch_tokens, seed, patch)
            again = text_of(lengths, asked, batch_tokens, seed, patch)
        except DataError as error:
            # Too little for what is asked, with the largest documents held out or none small enough, or for one batch.
            assert train + seq_len > sum(usable) - max(usable) - 3 * 64 * len(lengths) or "fill no batch" in str(error)
            return
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen: dict[str, set[int]] = {}
    for side, some in (("train", text.train), ("valid", text.valid)):
        tokens = tokens_in(some)
        assert len(set(tokens)) == len(tokens), "a token is read twice"
        seen[side] = set(document[np.array(tokens) - FIRST].tolist())
        for batch in some:
            assert batch.dtype == torch.int64 and (batch.diff(dim=1) == 1).all(), "a row has gaps"
            assert all(len(set(document[np.array(row) - FIRST])) == 1 for row in batch.tolist())
            assert batch.shape[1] == seq_len or (batch.shape[1] < seq_len and batch.shape[1] % 64 == 0)
            assert batch.numel() <= batch_tokens
    assert not seen["train"] & seen["valid"], "a document is on both sides"
    lost = train - len(tokens_in(text.train))
    assert -64 < lost <= max(batch_tokens, seq_len) + (seq_len % 64) * rows * len(text.train)
    assert seq_len <= len(tokens_in(text.valid)) < seq_len + 64
    assert all(torch.equal(a, b) for a, b in zip(text.train, again.train, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(text.valid, again.valid, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=80), st.sampled_from([2048, 4096, 5000]))
def test_less_than_one_batch_is_lost(units: list[int], batch_tokens: int) -> None:
    ends = np.cumsum([64 * n for n in units]).tolist()
    rows = [np.arange(end - 64 * n, end, dtype=np.int32) for n, end in zip(units, ends, strict=True)]
    packed = pack(rows, batch_tokens)
    tokens = tokens_in(packed)
    assert len(set(tokens)) == len(tokens)
    assert sum(map(len, rows)) - len(tokens) < batch_tokens
    for batch in packed:
        assert (batch.diff(dim=1) == 1).all()
        assert len(batch) == batch_tokens // batch.shape[1], "a batch is as full as its length allows"


def test_long_documents_give_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of([5000, 20_000, 30_000], DataSettings(1024, 40_000, 1024), 2048, 0, monkeypatch)
    long = sum(batch.numel() for batch in text.train if batch.shape[1] == 1024)
    assert long / len(tokens_in(text.train)) > 0.95
    assert [tuple(batch.shape) for batch in text.valid] == [(1, 1024)]


def test_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, lengths = DataSettings(128, 2048, 256), [700] * 20
    found = [set(tokens_in(text_of(lengths, asked, 256, seed, monkeypatch).train)) for seed in range(3)]
    assert found[0] != found[1] != found[2]


def test_a_text_that_occurs_twice_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = documents_of([1000, 1000, 1000]) * 2
    monkeypatch.setattr(batches, "read_documents", lambda paths, tokenizer: iter(twice))
    text = training_batches(Letters(), [Source(Path("text"))], DataSettings(128, 1792, 512), 256, 0)
    tokens = tokens_in([*text.train, *text.valid])
    assert len(set(tokens)) == len(tokens)


def test_held_out_documents_are_few_of_a_large_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [20_000] * 4 + [500] * 200
    text = text_of(lengths, DataSettings(256, 160_000, 2048), 1024, 0, monkeypatch)
    document = np.repeat(np.arange(len(lengths)), lengths)
    held = set(document[np.array(tokens_in(text.valid)) - FIRST].tolist())
    assert sum(lengths[i] for i in held) <= 0.05 * sum(lengths) and len(held) >= 4


@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        ([], 512, "the training data is empty: text"),
        ([5000], 512, "text holds one document: what is held out must be of another"),
        ([300, 300], 512, "holds 600 tokens in 2 documents, 512 of them in rows of at least 64; the recipe needs 512"),
        ([63] * 100, 512, "holds 6300 tokens in 100 documents, 0 of them"),
        ([600] * 4, 128, "128 tokens fill no batch of 256"),
    ],
)
def test_too_little_text_is_named(
    lengths: list[int], tokens: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=message):
        text_of(lengths, DataSettings(128, tokens, 128), 256, 0, monkeypatch)


@pytest.mark.model
@pytest.mark.skipif(not DATA.exists(), reason="the project's training data is not here")
@pytest.mark.parametrize(
    ("file", "most_lost", "least_whole"),
    [("train_text_00", 0.03, 0.6), ("train_chat", 0.17, 0.0)],
    ids=["text", "chat"],
)
def test_little_of_real_text_is_lost(
    file: str, most_lost: float, least_whole: float, default_model: Path, tmp_path: Path
) -> None:
    """Of the tokens of documents that are taken whole, those at their ends and the last unfilled batch."""
    from itertools import islice

    from dsla.distill.data import read_documents

    tokenizer = load_tokenizer(default_model)
    documents = list(islice(read_documents([DATA / f"{file}.jsonl.zst"], tokenizer), 400))
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    counts = [len(ids) for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]]
    usable = sum(row_tokens(count, 2048) for count in counts)
    asked = DataSettings(2048, int(0.9 * usable), 2048)
    text = training_batches(tokenizer, [Source(tmp_path / "some.jsonl")], asked, 16_384, 0)
    trained = len(tokens_in(text.train))
    whole = sum(batch.numel() for batch in text.train if batch.shape[1] == 2048)
    assert 1 - usable / sum(counts) < most_lost
    assert trained > asked.tokens - 16_384
    assert whole / trained >= least_whole
