"""Text to hide things in: from books where there are some, else sentences made up by rule. Everything follows from seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Encode = Callable[[str], list[int]]

_CHARS_PER_TOKEN = 6
_WHO = ("the miller", "a young doctor", "my neighbour", "the old captain", "her brother", "the gardener", "a tall clerk",
        "the baker's son", "our teacher", "the night watchman", "a travelling salesman", "the judge")  # fmt: skip
_DID = ("walked to", "wrote a letter about", "forgot", "asked for", "looked at", "was proud of", "painted", "sold",
        "spoke of", "carried home", "returned to", "dreamed of")  # fmt: skip
_WHAT = ("the stone bridge", "a blue lantern", "the market square", "an empty boat", "the apple orchard", "a broken clock",
         "the long road north", "a basket of bread", "the harbour", "a grey horse", "the tower", "a winter coat")  # fmt: skip
_WHEN = ("before sunrise", "on a rainy evening", "in the spring", "after the fair", "every other Sunday", "without a word",
         "for the second time", "late in the year", "while the others slept", "at noon")  # fmt: skip
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class Haystack:
    """Ordinary text around a place, cut to a number of tokens.

    Args:
        texts: long texts to take it from; none = sentences made up by rule.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._texts = [text for text in texts if text.strip()]

    def around(self, encode: Encode, before: int, after: int, draw: random.Random) -> tuple[list[int], list[int]]:
        """Text on both sides of the end of a sentence.

        Args:
            encode: text to token ids.
            before: tokens in front of the place.
            after: tokens behind it.
            draw: where in the texts the place is follows from it.

        Returns:
            `before` and `after` token ids.
        """
        text = draw.choice(self._texts) if self._texts else made_up(draw, (before + after) * 2 * _CHARS_PER_TOKEN)
        place = _sentence_end(text, int(len(text) * draw.uniform(0.1, 0.9)))
        return _cut(encode, text, place, before, False), _cut(encode, text, place, after, True)


def made_up(draw: random.Random, length: int) -> str:
    """Sentences of no importance, at least `length` characters."""
    sentences: list[str] = []
    total = 0
    while total < length:
        words = " ".join(draw.choice(part) for part in (_WHO, _DID, _WHAT, _WHEN))
        sentences.append(f"{words[0].upper()}{words[1:]}.")
        total += len(sentences[-1]) + 1
    return " ".join(sentences)


def made_up_name(draw: random.Random, syllables: int = 3) -> str:
    """A name nobody has, such as `Rabeko`."""
    return "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(syllables)).capitalize()


def _sentence_end(text: str, place: int) -> int:
    ends = [text.find(mark, place) + 1 for mark in (". ", ".\n", "! ", "? ")]
    return min((end for end in ends if end), default=place)


def _cut(encode: Encode, text: str, place: int, tokens: int, forward: bool) -> list[int]:
    """`tokens` token ids that follow the place, or lead to it; where a text is too short it starts again."""
    size = tokens * _CHARS_PER_TOKEN + 16
    while tokens:
        whole = text * (size // len(text) + 2)
        at = place if forward else place + len(text) * (size // len(text) + 1)
        ids = encode(whole[at : at + size] if forward else whole[at - size : at])
        if len(ids) > tokens:
            # The outer end may cut a word in two, so one token there is left out.
            return ids[:tokens] if forward else ids[-tokens:]
        size *= 2
    return []
