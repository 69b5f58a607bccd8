"""Text streamed equals text in one piece, for every way of cutting the tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsla.errors import ModelError
from dsla.server.detokenize import Detokenizer, TokenBytes
from tests.server.tiny import sentencepiece_tokenizer, tiny_tokenizer

TEXTS = [
    "plain words, and more.",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🤷🏽‍♀️ shrug",
    "漢字かな交じり文、中文，한국어",
    "שלום עולם, مرحبا بالعالم",
    "é e\u0301 ﬁ \u00ad \u2028 \ufffd end",
    "  leading, trailing  \n\ttabs ",
]

SCRIPTS = "aé\u0301ß ▂\n🦆👩\u200d🤷🏽️漢字かם\u200fمرحﷺ\u0085\u2028\ufeff\ufffd"
WRITTEN = st.text(
    st.one_of(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), st.sampled_from(SCRIPTS)), max_size=40
)
"""Any text but for what SentencePiece writes for a space, which it cannot tell from one."""

KINDS = {"byte-level": (tiny_tokenizer(), ""), "byte-fallback": (sentencepiece_tokenizer(), " ")}
"""Tokenizers, and what they put before a text: with SentencePiece a text is the beginning of a word."""


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece style: bytes as `<0xNN>`, spaces as `▁`."""
    words = ["<unk>", "▁", "▁hello", "▁world", "x", "<0xZZ>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def streamed(table: TokenBytes, groups: list[list[int]]) -> str:
    detokenizer = Detokenizer(table)
    return "".join(detokenizer.add(group) for group in groups) + detokenizer.finish()


def cut(tokens: list[int], places: list[int]) -> list[list[int]]:
    ends = sorted({min(place, len(tokens)) for place in places} | {0, len(tokens)})
    return [tokens[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS, ids=["ascii", "emoji", "cjk", "right-to-left", "combining", "spaces"])
def test_streamed_text_is_the_text_at_every_boundary(kind: str, text: str) -> None:
    tokenizer, prefix = KINDS[kind]
    table = TokenBytes.of(tokenizer)
    tokens, text = tokenizer(text)["input_ids"], prefix + text
    for boundary in range(len(tokens) + 1):
        detokenizer = Detokenizer(table)
        first, second = detokenizer.add(tokens[:boundary]), detokenizer.add(tokens[boundary:])
        assert first + second + detokenizer.finish() == text
        assert text.startswith(first)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(WRITTEN, st.lists(st.integers(0, 200), max_size=10))
def test_any_text_any_cut(kind: str, text: str, places: list[int]) -> None:
    tokenizer, prefix = KINDS[kind]
    tokens = tokenizer(text)["input_ids"]
    assert streamed(TokenBytes.of(tokenizer), cut(tokens, places)) == (prefix + text if text else "")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 400), max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_any_tokens_any_cut(kind: str, tokens: list[int], places: list[int]) -> None:
    table = TokenBytes.of(KINDS[kind][0])
    whole = streamed(table, [tokens])
    assert streamed(table, cut(tokens, places)) == streamed(table, [[token] for token in tokens]) == whole
    # Nothing that was sent is ever taken back.
    detokenizer, sent = Detokenizer(table), ""
    for token in tokens:
        sent += detokenizer.add([token])
        assert whole.startswith(sent)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 400), max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_any_tokens_equal_the_tokenizers_decode(tokens: list[int], places: list[int]) -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert streamed(TokenBytes.of(tokenizer), cut(tokens, places)) == expected


def test_byte_fallback_completes_characters() -> None:
    tokenizer = fallback_tokenizer()
    table = TokenBytes.of(tokenizer)
    names = ["▁hello", *[f"<0x{byte:02X}>" for byte in "é🦆".encode()], "▁world", "<0xZZ>"]
    tokens = tokenizer.convert_tokens_to_ids(names)
    detokenizer = Detokenizer(table)
    assert [detokenizer.add([token]) for token in tokens] == [" hello", "", "é", "", "", "", "🦆", " world", "<0xZZ>"]
    assert streamed(table, [[token] for token in tokens]).removeprefix(" ") == tokenizer.decode(tokens)


def test_an_unfinished_character_is_sent_at_the_end_only() -> None:
    tokenizer = fallback_tokenizer()
    detokenizer = Detokenizer(TokenBytes.of(tokenizer))
    assert detokenizer.add(tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>"])) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_and_unknown_ids_are_silent() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert streamed(TokenBytes.of(tokenizer), [[end, 10**6]]) == ""
    assert streamed(TokenBytes.of(tokenizer, keep_special=True), [[end]]) == "<|im_end|>"


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    tokens = tokenizer("a<tool call>b")["input_ids"]
    assert streamed(TokenBytes.of(tokenizer), [tokens]) == "a<tool call>b"


def test_unknown_decoder_is_named() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer.json"):
        TokenBytes.of(object())
