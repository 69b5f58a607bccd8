"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.asgi import error
from tests.server.conftest import MODEL, Served
from tests.server.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "the quick 🦆"}]
TEXT = "the quick brown fox 漢字 🦆"


def test_a_prompt_is_tokenized_as_completions_do(served: Served) -> None:
    answer = served.http.post("/tokenize", json={"prompt": TEXT}).json()
    tokens = tiny_tokenizer()(TEXT)["input_ids"]
    assert answer == {"count": len(tokens), "max_model_len": 4096, "tokens": tokens, "token_strs": None}
    used = served.client.completions.create(model=MODEL, prompt=TEXT, max_tokens=1).usage
    assert used is not None and used.prompt_tokens == answer["count"]


def test_messages_are_tokenized_as_chats_do(served: Served) -> None:
    def tokens(**fields: Any) -> list[int]:
        found: list[int] = served.http.post("/tokenize", json={"messages": MESSAGES} | fields).json()["tokens"]
        return found

    expected = tiny_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert tokens() == tokens(model=MODEL) == expected
    without = tiny_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=False)["input_ids"]
    assert tokens(add_generation_prompt=False) == without != expected


def test_token_strings_are_those_of_the_vocabulary(served: Served) -> None:
    answer = served.http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    assert answer["token_strs"] == tiny_tokenizer().tokenize(TEXT)
    assert len(answer["token_strs"]) == answer["count"]


def test_detokenize_undoes_tokenize(served: Served) -> None:
    for text in (TEXT, "<|im_start|>user\n", ""):
        tokens = served.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert served.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/tokenize", {}, 400, "invalid_value"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "invalid_value"),
        ("/tokenize", {"prompt": 5}, 400, "invalid_type"),
        ("/tokenize", {"prompt": ["x"]}, 400, "invalid_type"),
        ("/tokenize", {"messages": []}, 400, "invalid_value"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "x"}]}, 400, "invalid_value"),
        ("/tokenize", {"prompt": "x", "model": "gpt-5"}, 404, "model_not_found"),
        ("/tokenize", {"prompt": "x", "frobnicate": 1}, 400, "unknown_parameter"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, 400, "invalid_type"),
        ("/detokenize", {}, 400, "missing_required_parameter"),
        ("/detokenize", {"tokens": "x"}, 400, "invalid_type"),
        ("/detokenize", {"tokens": [1.5]}, 400, "invalid_type"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_value"),
        ("/detokenize", {"tokens": [1, 10**30]}, 400, "invalid_value"),
        ("/detokenize", {"tokens": [1], "model": "gpt-5"}, 404, "model_not_found"),
    ],
    ids=str,
)
def test_bad_bodies(served: Served, path: str, body: dict[str, Any], status: int, code: str) -> None:
    assert error(served.http.post(path, json=body)) == (status, code)


def test_half_a_surrogate_pair_is_no_text(served: Served) -> None:
    content = b'{"prompt": "\\ud800"}'
    response = served.http.post("/tokenize", content=content, headers={"content-type": "application/json"})
    assert error(response) == (400, "invalid_value")
