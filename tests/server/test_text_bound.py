"""Texts that need not be tokenized to be refused: none that has few tokens is among them."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsla.server.detokenize import TokenBytes
from dsla.server.text_bound import TextBound
from tests.server.test_detokenize import SCRIPTS
from tests.server.tiny import sentencepiece_tokenizer, tiny_tokenizer

GREEK = "\u1fbe\u0308\u0301"
"""The text that gets shortest where it is composed, as far as is known: 7 bytes, and then 2."""


def composing() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def lacking_bytes() -> PreTrainedTokenizerFast:
    """Byte-level, without some bytes, as the default model's is."""
    vocabulary = {c: i for i, c in enumerate(c for c in pre_tokenizers.ByteLevel.alphabet() if c not in "xô")}
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[])
    return tokenizer


def stripping() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    return tokenizer


KINDS = {
    "byte-level": tiny_tokenizer(),
    "byte-fallback": sentencepiece_tokenizer(),
    "composing": composing(),
    "lacking bytes": lacking_bytes(),
    "stripping": stripping(),
}
BOUNDS = {name: TextBound(tokenizer, TokenBytes.of(tokenizer, keep_special=True)) for name, tokenizer in KINDS.items()}
PARTS = [
    *SCRIPTS,
    GREEK,
    "x",
    "\U00040000",
    "<x>",
    "<|endoftext|>",
    "<|im_end|>",
    "</s>",
    "▁▁",
    "the quick",
    "\u3000",
    "e\u0301",
]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.one_of(st.sampled_from(PARTS), st.characters(exclude_categories=["Cs"])), max_size=12),
    st.integers(1, 9),
)
def test_no_text_that_has_few_tokens_is_said_to_have_many(kind: str, parts: list[str], times: int) -> None:
    text = "".join(part * times for part in parts)
    tokens = len(KINDS[kind](text, add_special_tokens=False)["input_ids"])
    assert not BOUNDS[kind].exceeded(text, tokens) or tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_many_tokens(kind: str) -> None:
    assert BOUNDS[kind].exceeded("the quick " * 10_000, 100)
    assert not BOUNDS[kind].exceeded("the quick " * 10, 100)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("lacking bytes", "x" * 10_000), ("stripping", "<x>" + " \u3000\n" * 10_000 + "<x>"), ("composing", GREEK * 100)],
    ids=["lacking bytes", "stripping", "composing"],
)
def test_what_leaves_no_token_does_not_count(kind: str, text: str) -> None:
    tokens = max(len(KINDS[kind](text, add_special_tokens=False)["input_ids"]), 1)
    assert tokens <= 400
    assert not BOUNDS[kind].exceeded(text, tokens)
    assert BOUNDS["byte-level"].exceeded(text * 10, tokens)


def test_composing_makes_no_text_shorter_than_is_assumed() -> None:
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        composed = unicodedata.normalize("NFC", chr(code))
        longest = unicodedata.normalize("NFD", chr(code))
        assert max(len(chr(code).encode()), len(longest.encode())) <= 4 * len(composed.encode())
    assert len(GREEK.encode()) <= 4 * len(unicodedata.normalize("NFC", GREEK).encode())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.NFKC()),
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        ("normalizer", normalizers.Replace("x", "")),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])),
        ("pre_tokenizer", None),
        ("model", models.Unigram([("x", 0.0)], 0)),
        ("model", models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True)),
    ],
    ids=str,
)
def test_where_any_text_may_get_short_nothing_is_said(part: str, value: Any) -> None:
    tokenizer = tiny_tokenizer()
    backend: Tokenizer = tokenizer.backend_tokenizer
    setattr(backend, part, value)
    bound = TextBound(tokenizer, TokenBytes.of(tokenizer, keep_special=True))
    assert not bound.exceeded("the quick " * 10_000, 1)
