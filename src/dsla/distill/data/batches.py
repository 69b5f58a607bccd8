"""Training text as batches of equal-length rows, each row from one document: no padding, no masks, nothing to leak.

A document gives whole windows of `seq_len` tokens and one shorter row, whose length is a multiple of 64. Rows of one length
make batches; rows that fill none are cut down to the next shorter length, and what is cut off is a row of its own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsla.distill.data.pieces import Ids
from dsla.distill.data.records import read_documents
from dsla.distill.data.sources import Source, mixture
from dsla.distill.data.split import UNIT, row_tokens, split_documents
from dsla.distill.data.vocabulary import check_tokens
from dsla.distill.recipe import DataSettings
from dsla.errors import DataError


@dataclass(frozen=True)
class TrainingText:
    """Tokens to train on and tokens to measure on, of different documents.

    Attributes:
        train: batches of token ids `[rows, length]` int64; their order means nothing.
        valid: the same, never trained on.
    """

    train: list[Tensor]
    valid: list[Tensor]


def training_batches(
    tokenizer: Any, sources: Sequence[Source], settings: DataSettings, batch_tokens: int, seed: int
) -> TrainingText:
    """Reads, draws and packs the text of a conversion; the same for the same arguments.

    Args:
        tokenizer: a Hugging Face tokenizer.
        sources: where the text is, and in which shares.
        settings: length and number of tokens.
        batch_tokens: tokens a batch, or somewhat fewer.
        seed: of what is drawn and of what is held out.

    Raises:
        DataError: as `read_documents`; if the text is empty or too short.
    """
    train: list[Ids] = []
    valid: list[Ids] = []
    used: set[int] = set()
    for share, paths in mixture(sources):
        wanted, held_out = round(share * settings.tokens), round(share * settings.valid_tokens)
        name = ", ".join(map(str, paths))
        documents = read_documents(paths, tokenizer)
        split = split_documents(tokenizer, documents, name, wanted, held_out, settings.seq_len, used, seed)
        train += _rows(split.train, settings.seq_len, wanted, seed)
        valid += _rows(split.valid, settings.seq_len, held_out, seed)
    random.Random(seed).shuffle(train)
    batches = pack(train, batch_tokens)
    if not batches:
        raise DataError(f"{sum(map(len, train))} tokens fill no batch of {batch_tokens}: raise recipe.data.tokens")
    return TrainingText(batches, _grouped(valid, batch_tokens))


def text_for(
    model: Any, tokenizer: Any, sources: Sequence[Source], settings: DataSettings, batch_tokens: int, seed: int
) -> TrainingText:
    """`training_batches`, made sure to be of tokens that the model has.

    Raises:
        DataError: as `training_batches`; if the model does not know a token.
    """
    text = training_batches(tokenizer, sources, settings, batch_tokens, seed)
    check_tokens([*text.train, *text.valid], model)
    return text


def pack(rows: Iterable[Ids], batch_tokens: int) -> list[Tensor]:
    """Rows as batches of equal-length rows, all as full as rows of their length allow; less than one batch is left out.

    Args:
        rows: token ids of any lengths; those of one length should be in random order.
        batch_tokens: at most so many tokens a batch, except that a batch has at least one row.

    Returns:
        Token ids `[rows, length]` int64, longest first.
    """
    by_length: defaultdict[int, list[Ids]] = defaultdict(list)
    for row in rows:
        by_length[len(row)].append(row)
    batches = []
    while by_length:
        length = max(by_length)
        same = by_length.pop(length)
        count = max(batch_tokens // length, 1)
        whole = len(same) - len(same) % count
        batches += [_tensor(same[i : i + count]) for i in range(0, whole, count)]
        shorter = (length - 1) // UNIT * UNIT
        for row in same[whole:]:
            for part in (row[:shorter], row[shorter:]):
                if shorter and len(part) >= UNIT:
                    by_length[len(part)].append(part)
    return batches


def _rows(runs: Iterable[Ids], seq_len: int, tokens: int, seed: int) -> list[Ids]:
    """Rows of the runs in random order, as many as make up `tokens`, the last of them cut."""
    rows = []
    for run in runs:
        end = row_tokens(len(run), seq_len)
        rows += [run[i : min(i + seq_len, end)] for i in range(0, end, seq_len)]
    random.Random(seed).shuffle(rows)
    chosen, left = [], tokens
    for row in rows:
        if left <= 0:
            break
        chosen.append(row[: -(-left // UNIT) * UNIT])
        left -= len(chosen[-1])
    return chosen


def _grouped(rows: Iterable[Ids], batch_tokens: int) -> list[Tensor]:
    """Rows as batches of equal-length rows, none cut and none left out, however few there are of a length."""
    by_length: defaultdict[int, list[Ids]] = defaultdict(list)
    for row in rows:
        by_length[len(row)].append(row)
    batches = []
    for length, same in sorted(by_length.items(), reverse=True):
        count = max(batch_tokens // length, 1)
        batches += [_tensor(same[i : i + count]) for i in range(0, len(same), count)]
    return batches


def _tensor(rows: Sequence[Ids]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
