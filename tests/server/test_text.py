"""Text streamed equals text in one piece, over HTTP, whatever the tokens break it into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import MODEL, Served, serving
from tests.server.test_detokenize import SCRIPTS
from tests.server.test_openai import events
from tests.server.tiny import sentencepiece_tokenizer

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def byte_fallback() -> Iterator[Served]:
    with serving(sentencepiece_tokenizer()) as served:
        yield served


@pytest.fixture(params=["byte-level", "byte-fallback"])
def either(request: pytest.FixtureRequest) -> Served:
    """Servers of the same model with tokens of two kinds."""
    served: Served = request.getfixturevalue("served" if request.param == "byte-level" else "byte_fallback")
    return served


def pieces(served: Served, fields: dict[str, Any]) -> tuple[str, list[str]]:
    """The text in one piece, and as a stream sends it."""
    body = {"model": MODEL, "prompt": [5, 6, 7], **fields}
    response = served.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    whole: str = response.json()["choices"][0]["text"]
    return whole, [chunk["choices"][0]["text"] for chunk in events(served, "/v1/completions", body)]


def test_every_length_of_an_answer(either: Served) -> None:
    """The tokens are random: they break characters off, and begin them in the middle."""
    fields = {"temperature": 2, "seed": 8, "ignore_eos": True}
    whole, _ = pieces(either, fields | {"max_tokens": 60})
    assert REPLACEMENT in whole
    for length in range(1, 30):
        text, streamed = pieces(either, fields | {"max_tokens": length})
        assert "".join(streamed) == text
        assert whole.startswith(text.removesuffix(REPLACEMENT))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from(SCRIPTS), min_size=1, max_size=12), st.integers(0, 2**31))
def test_every_character_at_every_boundary(either: Served, text: str, seed: int) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance, which the extra `serve` installs")
    form = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"const": text}}}
    whole, streamed = pieces(either, {"response_format": form, "max_tokens": 200, "seed": seed, "temperature": 2})
    assert json.loads(whole) == text
    assert "".join(streamed) == whole
