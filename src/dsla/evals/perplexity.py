"""Perplexity over fixed windows: as a number, and as tasks that say where in a window it is lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla.distill.data import read_documents
from dsla.errors import DataError
from dsla.evals.forward import encode
from dsla.evals.subject import Subject
from dsla.evals.task import Item, Task

BUCKETS = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Bounds of the position buckets, in tokens."""

_CHARS_PER_TOKEN = 8


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        model: a Hugging Face causal language model.
        windows: token ids `[n, T]`; no beginning-of-text token is added.

    Returns:
        The perplexity.
    """
    device = next(model.parameters()).device
    total = 0.0
    for window in windows.to(device):
        logits = model(window.unsqueeze(0)).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def perplexity_task(name: str, windows: Tensor) -> Task:
    """Negative log-likelihood of windows, an item a window, its parts by position.

    Args:
        name: of the text.
        windows: token ids `[n, T]`.

    Returns:
        A task with metric `nll`.
    """
    count, length = windows.shape
    bounds = [bound for bound in BUCKETS if bound < length] + [length]

    def run(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        for i, window in enumerate(windows):
            if (key := str(i)) in done:
                continue
            losses = -subject.token_log_probs(window).double()
            parts = {}
            for low, high in itertools.pairwise(bounds):
                # The first loss is of the token at position 1.
                inside = losses[max(low - 1, 0) : high - 1]
                if len(inside):
                    parts[f"{_short(low)}-{_short(high)}"] = [float(inside.mean()), len(inside)]
            yield Item(key, float(losses.mean()), len(losses), {"parts": parts})

    return Task(
        name=f"perplexity/{name}", group="perplexity", metric="nll", run=run, items=count, higher_is_better=False,
        tokens=length, reads=count * length,
    )  # fmt: skip


def first_windows(tokenizer: Any, path: Path, count: int, length: int) -> Tensor:
    """The first `count` windows of a text, one after the other; no special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        path: a text file, or one with a document a line, of which the first counts.
        count: windows.
        length: tokens of each.

    Returns:
        Token ids `[count, length]`.

    Raises:
        DataError: the file cannot be read, or is too short.
    """
    ids = _first_tokens(tokenizer, next(read_documents([path]), ""), count * length, path)
    return torch.tensor(ids).view(count, length)


def document_windows(tokenizer: Any, path: Path, count: int, length: int) -> Tensor:
    """The first `length` tokens of each of the first `count` documents; as `first_windows` otherwise."""
    documents = list(itertools.islice(read_documents([path]), count))
    if len(documents) < count:
        raise DataError(f"{path} holds {len(documents)} texts, expected at least {count}")
    return torch.tensor([_first_tokens(tokenizer, text, length, path) for text in documents])


def _first_tokens(tokenizer: Any, text: str, count: int, path: Path) -> Sequence[int]:
    # Tokens of a beginning are those of the whole text but for its last word, which must not count.
    ids = encode(tokenizer, text[: count * _CHARS_PER_TOKEN])[:-1]
    if len(ids) < count:
        ids = encode(tokenizer, text)
    if len(ids) < count:
        raise DataError(f"{path}: a text has {len(ids)} tokens, expected at least {count}")
    return ids[:count]


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)
