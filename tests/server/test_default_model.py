"""The default model's tokenizer: text streamed equals text in one piece."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dsla.server.detokenize import Detokenizer, TokenBytes
from tests.server.test_detokenize import TEXTS, cut, streamed

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from dsla.hub import resolve_model

    return AutoTokenizer.from_pretrained(resolve_model(None))


@pytest.mark.parametrize("text", TEXTS, ids=["ascii", "emoji", "cjk", "right-to-left", "combining", "spaces"])
def test_text_survives_every_boundary(tokenizer: Any, text: str) -> None:
    table = TokenBytes.of(tokenizer)
    tokens = tokenizer(text)["input_ids"]
    for boundary in range(len(tokens) + 1):
        detokenizer = Detokenizer(table)
        first = detokenizer.add(tokens[:boundary])
        assert text.startswith(first)
        assert first + detokenizer.add(tokens[boundary:]) + detokenizer.finish() == text


def test_random_tokens_decode_as_the_tokenizer_does(tokenizer: Any) -> None:
    table, draw = TokenBytes.of(tokenizer), random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(40))]
        expected = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert streamed(table, cut(tokens, [draw.randrange(41) for _ in range(5)])) == expected


def test_every_token_alone(tokenizer: Any) -> None:
    table = TokenBytes.of(tokenizer)
    for token in range(len(tokenizer)):
        expected = tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert streamed(table, [[token]]) == expected
