"""Which documents are trained on and which are held out, and how much is drawn of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsla.distill.data.pieces import Ids, Piece, draw_pieces, tokenized
from dsla.errors import DataError

UNIT = 64
"""Rows shorter than a window have a multiple of this many tokens."""

_CHARS_PER_TOKEN = 5
_MARGIN = 1.25
_HELD_OUT_SHARES = (0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Split:
    """Runs of tokens, each a contiguous part of one document; no document has runs on both sides."""

    train: list[Ids]
    valid: list[Ids]


def row_tokens(count: int, seq_len: int) -> int:
    """How many of a run's tokens go into rows: whole windows, and what is left in units."""
    rest = count % seq_len
    return count - rest + rest // UNIT * UNIT


def split_documents(
    tokenizer: Any, documents: Iterable[str], name: str, train: int, valid: int, seq_len: int, used: set[int], seed: int
) -> Split:
    """Draws text to train on, and text of other documents to measure on.

    Both are drawn piece by piece, so that a document counts by its length. Documents are held out whole: a piece that is drawn
    for measuring keeps its document from training. So that this costs little, documents that together are more than 5% of the
    text are not held out unless there are no others.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: texts.
        name: what they are, for messages.
        train: tokens there must be to train on, in rows.
        valid: tokens there must be to measure on, in rows.
        seq_len: tokens of a window.
        used: documents that were drawn before, which are passed over; those drawn here are added.
        seed: of the draw.

    Raises:
        DataError: if the documents are empty or too short.
    """
    drawn = draw_pieces(documents, seq_len * _CHARS_PER_TOKEN, train + valid, seed)
    if not drawn:
        raise DataError(f"the training data is empty: {name}")
    pieces = [piece for piece in drawn if piece.document not in used]
    source, taken, wanted = tokenized(tokenizer, pieces), list[tuple[Piece, Ids]](), 0
    while len(taken) < len(pieces):
        wanted = int(max(wanted, train + valid) * _MARGIN)
        taken += _until(source, wanted - sum(len(ids) for _, ids in taken))
        held_out = _held_out(taken, valid, seq_len)
        if held_out is None:
            continue
        apart = {piece.document for piece, _ in held_out}
        runs = _runs([pair for pair in taken if pair[0].document not in apart], seq_len)
        if sum(row_tokens(len(run), seq_len) for run in runs) >= train:
            used |= {piece.document for piece, _ in taken}
            return Split(runs, _runs(held_out))
    raise DataError(_too_short(taken, name, train, valid, seq_len))


def _until(source: Iterable[tuple[Piece, Ids]], tokens: int) -> list[tuple[Piece, Ids]]:
    taken = []
    for pair in source:
        taken.append(pair)
        tokens -= len(pair[1])
        if tokens <= 0:
            break
    return taken


def _held_out(taken: Sequence[tuple[Piece, Ids]], tokens: int, seq_len: int) -> list[tuple[Piece, Ids]] | None:
    """The first pieces that make up `tokens`, of documents that are as small a share of the text as will do; or None."""
    lengths: Counter[int] = Counter()
    for piece, ids in taken:
        lengths[piece.document] += len(ids)
    for share in _HELD_OUT_SHARES:
        room, left = share * lengths.total(), tokens
        chosen: list[tuple[Piece, Ids]] = []
        documents: set[int] = set()
        for piece, ids in taken:
            if left <= 0:
                break
            if piece.document not in documents:
                if lengths[piece.document] > room:
                    continue
                room -= lengths[piece.document]
                documents.add(piece.document)
            chosen.append((piece, ids))
            left -= row_tokens(len(ids), seq_len)
        if left <= 0:
            return chosen
    # Small documents may have used up the room that a large one, which holds enough by itself, would have needed.
    for document in sorted(lengths, key=lengths.__getitem__):
        chosen = [(piece, ids) for piece, ids in taken if piece.document == document]
        if sum(row_tokens(len(ids), seq_len) for _, ids in chosen) >= tokens and len(lengths) > 1:
            return chosen
    return None


def _runs(pairs: Iterable[tuple[Piece, Ids]], seq_len: int = 0) -> list[Ids]:
    """Neighbouring pieces of a document joined again.

    With `seq_len`, a run that stops before its document does is cut to whole windows, if it has any: it is a part of a longer
    text, of which there is more to draw.
    """
    groups: list[tuple[list[Ids], bool]] = []
    after = (-1, -1)
    for piece, ids in sorted(pairs, key=lambda pair: pair[0][:2]):
        before = groups.pop()[0] if piece[:2] == after else []
        groups.append(([*before, ids], piece.last))
        after = (piece.document, piece.part + 1)
    runs = []
    for group, ends in groups:
        run = np.concatenate(group)
        whole = len(run) // seq_len * seq_len if seq_len and not ends else 0
        runs.append(run[: whole or len(run)])
    return runs


def _too_short(taken: Sequence[tuple[Piece, Ids]], name: str, train: int, valid: int, seq_len: int) -> str:
    documents = len({piece.document for piece, _ in taken})
    if not documents:
        return f"every document of {name} is in the data named before it"
    if documents == 1:
        return f"{name} holds one document: what is held out must be of another, so give more files, or a .jsonl of records"
    total = sum(len(ids) for _, ids in taken)
    usable = sum(row_tokens(len(run), seq_len) for run in _runs(taken))
    return (
        f"{name} holds {total} tokens in {documents} documents, {usable} of them in rows of at least {min(UNIT, seq_len)}; "
        f"the recipe needs {train} to train on and {valid} in documents held out: give more data or lower its tokens"
    )
