"""From token ids to text, one token at a time, exact in UTF-8.

Every token of a byte-level or byte-fallback tokenizer stands for a fixed string of bytes, whatever stands beside it. So
a table of those bytes and Python's incremental UTF-8 decoder give the same text for every way of cutting the tokens
into pieces, and an unfinished character is never sent. The text is that of a *continuation*: nothing is stripped at its
start.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any

from dsla.errors import ModelError

_BYTE_TOKEN_LENGTH = len("<0xNN>")


class TokenBytes:
    """The bytes that each token id of a tokenizer stands for."""

    def __init__(self, table: list[bytes]) -> None:
        """
        Args:
            table: bytes of each token id; ids beyond it and special tokens stand for nothing.
        """
        self._table = table

    def __getitem__(self, token: int) -> bytes:
        """Bytes of a token id (int >= 0), `b""` for a special or unknown one."""
        return self._table[token] if token < len(self._table) else b""

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._table), default=0)

    @classmethod
    def of(cls, tokenizer: Any, keep_special: bool = False) -> TokenBytes:
        """Reads the table from a Hugging Face fast tokenizer.

        Args:
            tokenizer: `PreTrainedTokenizerFast` with a byte-level, byte-fallback or metaspace decoder.
            keep_special: bool, default False: special tokens stand for nothing.

        Raises:
            ModelError: the tokenizer is not a fast one or has another decoder.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__} has no decoder of the `tokenizers` library: "
                "use a model that ships a tokenizer.json"
            )
        byte_level = _is_byte_level(json.loads(backend.decoder.__getstate__()))
        special = {i for i, t in backend.get_added_tokens_decoder().items() if t.special and not keep_special}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        alphabet = byte_alphabet()
        table = [b""] * (1 + max(vocabulary.values(), default=-1))
        for text, token in vocabulary.items():
            if token not in special:
                table[token] = _byte_level_bytes(text, alphabet) if byte_level else _fallback_bytes(text)
        return cls(table)


class Detokenizer:
    """Text of one request's tokens, incrementally.

    The texts returned by `add` and the last one by `finish` joined are the same for every grouping of the tokens.
    """

    def __init__(self, table: TokenBytes) -> None:
        """
        Args:
            table: `TokenBytes` of the model's tokenizer.
        """
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Iterable[int]) -> str:
        """Text that is complete after these further token ids; `""` inside a character."""
        return self._decoder.decode(b"".join(self._table[token] for token in tokens))

    def finish(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD, or `""` where there is none."""
        return self._decoder.decode(b"", final=True)


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    parts = decoder.get("decoders", []) if decoder["type"] == "Sequence" else [decoder]
    kinds = [part["type"] for part in parts]
    if "ByteLevel" in kinds:
        return True
    if "ByteFallback" in kinds or kinds == ["Metaspace"]:
        return False
    raise ModelError(
        f"tokenizer with decoder {kinds} is not supported: expected ByteLevel, ByteFallback or Metaspace, "
        "whose tokens stand for fixed bytes"
    )


def byte_alphabet() -> dict[str, int]:
    """Character that a byte-level BPE vocabulary writes for each byte (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(text: str, alphabet: dict[str, int]) -> bytes:
    # Added tokens are stored as plain text: one character outside the alphabet says so.
    if all(character in alphabet for character in text):
        return bytes(alphabet[character] for character in text)
    return text.encode()


def _fallback_bytes(text: str) -> bytes:
    if len(text) == _BYTE_TOKEN_LENGTH and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            return text.encode()
    return text.replace("▁", " ").encode()
