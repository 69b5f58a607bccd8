"""Perplexity as a task: the same figure as the plain one, in all and by position."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch

from dsla.errors import DataError
from dsla.evals import perplexity
from dsla.evals.perplexity import document_windows, first_windows, perplexity_task
from tests.evals.tiny import subject, tokens
from tests.server.tiny import tiny_tokenizer


@pytest.mark.parametrize("level", [0, 4])
def test_task_is_the_plain_figure(level: int) -> None:
    model = subject()
    model.set(level)
    windows = torch.tensor([tokens(1200, 1), tokens(1200, 2)])
    task = perplexity_task("text", windows)
    items = list(task.run(model, frozenset()))
    assert [item.id for item in items] == ["0", "1"] and task.items == 2 and task.tokens == 1200
    mean = sum(item.score * item.weight for item in items) / sum(item.weight for item in items)
    assert math.exp(mean) == pytest.approx(perplexity(model.model, windows), rel=1e-5)
    for item, window in zip(items, windows, strict=True):
        losses = -model.token_log_probs(window)
        assert list(item.details["parts"]) == ["0-256", "256-1k", "1k-1200"]
        assert item.details["parts"]["256-1k"] == [pytest.approx(float(losses[255:1023].mean())), 768]
        assert [n for _, n in item.details["parts"].values()] == [255, 768, 176]
        total = sum(mean * n for mean, n in item.details["parts"].values())
        assert total / 1199 == pytest.approx(item.score)
    assert [item.id for item in task.run(model, frozenset(["0"]))] == ["1"]


def test_windows_are_the_first_ones(tmp_path: Path) -> None:
    tokenizer, text = tiny_tokenizer(), "the quick brown fox jumps over the lazy dog 123456789 " * 40
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert first_windows(tokenizer, path, 3, 50).flatten().tolist() == whole[:150]
    with pytest.raises(DataError, match="text.txt.gz: a text has .* tokens, expected at least 50000"):
        first_windows(tokenizer, path, 10, 5000)

    books = tmp_path / "books.jsonl"
    books.write_text("".join(f'{{"text": "book {i} {text}"}}\n' for i in range(3)))
    found = document_windows(tokenizer, books, 2, 60)
    for i, row in enumerate(found.tolist()):
        assert row == tokenizer(f"book {i} {text}", add_special_tokens=False)["input_ids"][:60]
    with pytest.raises(DataError, match="holds 3 texts, expected at least 4"):
        document_windows(tokenizer, books, 4, 60)
