"""What the demo runs: openings of books as prompts, and the memory they need.

The excerpts in `books.jsonl` are the first pages of eight novels in editions of Standard Ebooks. Texts: US public domain.
Contributions of Standard Ebooks: CC0 1.0. Each line names the edition's repository and commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsla.engine import Arena, PackedDecoder
from dsla.errors import ConfigError

_BOOKS = Path(__file__).with_name("books.jsonl")
_DEFAULT_SHARE = 0.45
_ROOM_ABOVE_LEAST = 1.25


@dataclass(frozen=True)
class Book:
    """The opening of a book.

    Attributes:
        title: its title.
        author: its author.
        source: URL of the repository it is from.
        commit: commit of that repository.
        licence: of text and edition.
        tokens: tokens of `text` with the default model's tokenizer.
        text: the excerpt.
    """

    title: str
    author: str
    source: str
    commit: str
    licence: str
    tokens: int
    text: str


def load_books() -> list[Book]:
    """The eight excerpts, of about 2,000 to 6,000 tokens."""
    return [Book(**json.loads(line)) for line in _BOOKS.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Stream:
    """One prompt of the demo.

    Attributes:
        title: title of its book.
        author: author of its book.
        prompt: token ids.
        max_tokens: tokens to write.
    """

    title: str
    author: str
    prompt: list[int]
    max_tokens: int

    @property
    def final_tokens(self) -> int:
        """Tokens it remembers in the end; the last one written is never read."""
        return len(self.prompt) + self.max_tokens - 1

    @classmethod
    def of(cls, book: Book, tokenizer: Any, max_tokens: int, context: int) -> Stream:
        """The stream of a book.

        Args:
            book: the book.
            tokenizer: the model's.
            max_tokens: tokens to write.
            context: tokens the model was made for.

        Raises:
            ConfigError: prompt and answer exceed the context.
        """
        prompt: list[int] = tokenizer(book.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(prompt) + max_tokens > context:
            raise ConfigError(
                f"the demo's prompt from {book.title!r} has {len(prompt):,} tokens and writes {max_tokens:,} more, the "
                f"model's context is {context:,} tokens: choose a model with a longer context, or fewer --max-tokens"
            )
        return cls(book.title, book.author, prompt, max_tokens)


@dataclass(frozen=True)
class Need:
    """Bytes that streams take at their full length.

    Attributes:
        at_level_0: all of them at once, at level 0.
        at_least: all of them at once, converted as far as that saves memory.
        one_at_a_time: the largest of them alone, converted as far as that saves memory.
    """

    at_level_0: int
    at_least: int
    one_at_a_time: int

    @classmethod
    def of(cls, streams: Sequence[Stream], decoder: PackedDecoder, arena: Arena) -> Need:
        """What `streams` need in an arena like `arena` (its budget does not matter)."""
        top, layers = len(decoder.order), decoder.n_layers
        pages = [arena.page_count(stream.final_tokens) for stream in streams]
        least = [(layers - top) * count + top * min(count, arena.slot_units) for count in pages]
        return cls(
            at_level_0=sum(pages) * layers * arena.page_bytes,
            at_least=sum(least) * arena.page_bytes,
            one_at_a_time=max(least) * arena.page_bytes,
        )

    @property
    def default_budget(self) -> int:
        """A budget that does not hold the streams at level 0, and holds all of them at once after conversions.

        Where no conversion saves memory, there is none such, and it is what they need.
        """
        wanted = int(max(_DEFAULT_SHARE * self.at_level_0, _ROOM_ABOVE_LEAST * self.at_least))
        return min(wanted, (self.at_least + self.at_level_0) // 2)

    def check(self, budget_bytes: int) -> None:
        """Checks that every stream can run within a budget, if only one after the other.

        Raises:
            ConfigError: one of them cannot.
        """
        if budget_bytes < self.one_at_a_time:
            raise ConfigError(
                f"a memory budget of {budget_bytes:,} bytes is too small for the demo: its longest stream alone needs "
                f"{self.one_at_a_time:,} bytes with every layer converted that can be; all at once need "
                f"{self.at_least:,}, or {self.at_level_0:,} at level 0"
            )
