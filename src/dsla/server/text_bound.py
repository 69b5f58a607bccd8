"""How long a text can be that has so few tokens: one that is longer need not be tokenized to be refused.

A token stands for so many bytes at most; but what a tokenizer does to a text before may shorten it, and some of it may leave no
token at all.
"""

from __future__ import annotations

import json
import math
from typing import Any

from dsla.server.detokenize import TokenBytes, byte_alphabet

_SHORTER: dict[str, int] = {
    "ByteLevel": 1,
    "Digits": 1,
    "UnicodeScripts": 1,
    "Prepend": 1,
    "NFC": 4,  # a Greek letter in U+1FBE, U+0308 and U+0301 is 7 bytes, and 2 composed
    "Metaspace": 3,  # the three bytes of its sign for a space are known as one byte, also where the text itself has that sign
}
"""Step of a tokenizer -> how many times fewer bytes a text may have after it. Others may leave out any part of it."""

_SPACES = {byte for code in range(0x10000) if chr(code).isspace() for byte in chr(code).encode()}


class TextBound:
    """Tells texts that have too many tokens by their length; where it cannot tell, it lets them pass.

    Args:
        tokenizer: Hugging Face fast tokenizer.
        names: bytes of its tokens, special ones too.
    """

    def __init__(self, tokenizer: Any, names: TokenBytes) -> None:
        backend = tokenizer.backend_tokenizer
        steps = [step for step in (backend.normalizer, backend.pre_tokenizer) if step is not None]
        ignored = _ignored(backend)
        self._longest = (
            0
            if ignored is None
            else names.longest * math.prod(_shorter(json.loads(step.__getstate__())) for step in steps)
        )
        self._ignored = bytes(sorted(ignored or ()))

    def exceeded(self, text: str, tokens: int) -> bool:
        """Whether a text has more than so many tokens, for certain."""
        most = tokens * self._longest
        if not most or 4 * len(text) <= most:
            return False
        return len(text.encode().translate(None, self._ignored)) > most


def _shorter(step: dict[str, Any]) -> int:
    """How many times fewer bytes a text may have after a step; 0 = there is no telling."""
    kind = step["type"]
    if kind == "Sequence":
        return math.prod(map(_shorter, step.get("normalizers") or step.get("pretokenizers") or ()))
    if kind == "Replace":
        return _SHORTER["Metaspace"] if (step["pattern"], step["content"]) == ({"String": " "}, "▁") else 0
    if kind in ("Split", "Punctuation"):
        return int(step["behavior"] != "Removed")
    return _SHORTER.get(kind, 0)


def _ignored(backend: Any) -> set[int] | None:
    """Bytes that may leave no token; None = any text may."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if model.byte_fallback:
        if any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
            return None
        ignored = set[int]()
    elif backend.pre_tokenizer is not None and b'"ByteLevel"' in backend.pre_tokenizer.__getstate__():
        ignored = {byte for character, byte in byte_alphabet().items() if character not in vocabulary}
    else:
        return None
    strips = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    return ignored | _SPACES if strips else ignored
