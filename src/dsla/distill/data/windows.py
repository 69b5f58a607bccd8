"""Windows of equal length, for measuring a model on text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsla.distill.data.pieces import Ids, draw_pieces, tokenized
from dsla.distill.data.records import read_documents
from dsla.distill.data.sources import Source, mixture
from dsla.errors import DataError

_CHARS_PER_TOKEN = 6


def mixed_windows(tokenizer: Any, sources: Sequence[Source], seq_len: int, count: int, seed: int) -> Tensor:
    """`count` windows of `seq_len` tokens `[count, seq_len]` int64, from each source as many as its weight says.

    Raises:
        DataError: as `token_windows` and `mixture`.
    """
    windows, done, share_so_far = [], 0, 0.0
    for share, paths in mixture(sources):
        share_so_far += share
        wanted = round(share_so_far * count) - done
        if wanted:
            windows.append(token_windows(tokenizer, read_documents(paths, tokenizer), seq_len, wanted, seed))
            done += wanted
    return torch.cat(windows)


def said_twice(windows: Tensor) -> Tensor:
    """Windows `[count, seq_len]` whose first half (the longer, of an odd length) comes again in place of the second."""
    length = windows.shape[1]
    return windows[:, torch.arange(length) % -(-length // 2)]


def token_windows(tokenizer: Any, documents: Iterable[str], seq_len: int, count: int, seed: int) -> Tensor:
    """`count` windows of `seq_len` tokens, drawn from all documents.

    A window is a piece of one document as long as there are enough documents of that length. If not, what is left over and
    shorter documents are joined, an end-of-text token after each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: texts.
        seq_len: tokens a window.
        count: windows.
        seed: of the draw.

    Returns:
        Token ids `[count, seq_len]` int64.

    Raises:
        DataError: if the documents are empty or too short for `count` windows, or have to be joined and the tokenizer names no
            end-of-text token.
    """
    pieces = draw_pieces(documents, seq_len * _CHARS_PER_TOKEN, count * seq_len, seed)
    if not pieces:
        raise DataError("the training data is empty")
    windows: list[Ids] = []
    rest: list[Ids] = []
    for _, ids in tokenized(tokenizer, pieces):
        whole = len(ids) - len(ids) % seq_len
        windows += [ids[i : i + seq_len] for i in range(0, whole, seq_len)]
        rest.append(ids[whole:])
        if len(windows) >= count:
            break
    else:
        windows += _joined(tokenizer, rest, seq_len, count - len(windows), found=len(windows) * seq_len)
    return torch.from_numpy(np.stack(windows[:count]).astype(np.int64))


def _joined(tokenizer: Any, rest: Sequence[Ids], seq_len: int, count: int, found: int) -> list[Ids]:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no end-of-text token to put between documents: set its eos_token")
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    ids = np.concatenate([part for some in rest if len(some) for part in (some, end)] or [end[:0]])
    if len(ids) < count * seq_len:
        raise DataError(
            f"the training data holds {found + len(ids)} tokens, the recipe needs {found + count * seq_len}: "
            f"give more data or lower its tokens"
        )
    return [ids[i : i + seq_len] for i in range(0, count * seq_len, seq_len)]
