"""Documents cut into pieces and drawn at random, of any number of documents and in bounded memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

_MOST_CHARS_PER_TOKEN = 32
_TOKENIZED_AT_ONCE = 64


class Piece(NamedTuple):
    """A piece of a document.

    Attributes:
        document: hash of the document's text, so that a text that occurs twice is one document.
        part: number of the piece in its document, from 0.
        text: its characters.
        last: whether the document ends with it.
    """

    document: int
    part: int
    text: str
    last: bool


def draw_pieces(documents: Iterable[str], size: int, tokens: int, seed: int) -> list[Piece]:
    """Pieces of about `size` characters, in random order, none twice; of a large corpus, enough of them for `tokens` tokens.

    A piece's place in the order is a hash of its text's and the seed, so it does not depend on the order of files, and only the
    first pieces are kept: a large corpus does not have to fit in memory.

    Args:
        documents: texts.
        size: characters; pieces end at a space where there is one near their end.
        tokens: how many are wanted.
        seed: of the order.
    """
    kept: list[tuple[int, Piece]] = []
    inside: set[tuple[int, int]] = set()
    enough, total = tokens * _MOST_CHARS_PER_TOKEN, 0
    salt = seed.to_bytes(8, "big", signed=True)
    for text in documents:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        document = int.from_bytes(digest, "big")
        for number, (part, last) in enumerate(_cut(text, size)):
            if (document, number) in inside or not part.strip():
                continue
            place = blake2b(digest + number.to_bytes(8, "big"), digest_size=8, salt=salt).digest()
            heapq.heappush(kept, (-int.from_bytes(place, "big"), Piece(document, number, part, last)))
            inside.add((document, number))
            total += len(part)
            while total - len(kept[0][1].text) >= enough:
                dropped = heapq.heappop(kept)[1]
                inside.remove(dropped[:2])
                total -= len(dropped.text)
    return [piece for _, piece in sorted(kept, reverse=True)]


def tokenized(tokenizer: Any, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Ids]]:
    """Every piece with its token ids, a few at a time, nothing added by the tokenizer."""
    for start in range(0, len(pieces), _TOKENIZED_AT_ONCE):
        some = pieces[start : start + _TOKENIZED_AT_ONCE]
        # Not verbose: a piece may be longer than the model's context, which is no mistake here.
        found = tokenizer([piece.text for piece in some], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(some, (np.asarray(ids, dtype=np.int32) for ids in found), strict=True)


def _cut(text: str, size: int) -> Iterator[tuple[str, bool]]:
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            # Before the space: tokenizers take it for a part of the next word.
            space = max(text.rfind(" ", end - size // 8, end), text.rfind("\n", end - size // 8, end))
            end = space if space > start else end
        yield text[start:end], end >= len(text)
        start = end
