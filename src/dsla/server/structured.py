"""Answers that are JSON of a schema: llguidance says which tokens may come next.

It is told the bytes that the detokenizer knows, so that what it lets through is what the client reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsla.engine import TokenConstraint
from dsla.errors import EngineError
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import ApiError
from dsla.server.schema_check import grammar_of, limits, problem

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_BYTES = 1 << 17
"""Bytes of a schema, at most, written in ASCII and without spaces."""

_MESSAGE_LENGTH, _REMEMBERED = 200, 16


class JsonConstraint:
    """Lets tokens come that go on with JSON of a schema, and end tokens where it is complete.

    Args:
        matcher: at the beginning of the answer, and nobody else's.
        vocab_size: token ids the model knows.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._known = 0

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        """Tokens that may come next `[vocab]`.

        Args:
            output: all tokens of the answer so far.

        Raises:
            EngineError: the schema takes more work here than is allowed.
        """
        self._matcher.consume_tokens(list(output[self._known :]))
        self._known = len(output)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise EngineError(f"the schema of the answer is too complex: {self._matcher.get_error()}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for.

    Args:
        encode: tokenizes a text.
        tokens: bytes of each token id, `b""` for those that no text has.
        end: a token id that ends an answer.
    """

    bos_token_id = None

    def __init__(self, encode: Callable[[str], list[int]], tokens: list[bytes], end: int) -> None:
        self._encode = encode
        self.tokens, self.eos_token_id = tokens, end
        self.tree: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that must come: those the model has learned, where they are that very text."""
        tokens = self._encode(text)
        if self.tree is None or b"".join(self.tokens[token] for token in tokens) == text.encode():
            return tokens
        return self.tree.greedy_tokenize(text)


class JsonSchemas:
    """Compiles schemas for the tokens of one model, one after the other, in a thread of its own.

    Args:
        tokenizer: Hugging Face fast tokenizer of the model.
        table: bytes of its tokens.
        vocab_size: token ids the model knows.
        ends: token ids that end an answer.
    """

    def __init__(self, tokenizer: Any, table: TokenBytes, vocab_size: int, ends: Collection[int]) -> None:
        self._backend, self._table, self._vocab_size = tokenizer.backend_tokenizer, table, vocab_size
        self._ends = sorted(end for end in ends if end < vocab_size)
        self._thread = ThreadPoolExecutor(1, "dsla-schemas")
        self._compiled = lru_cache(_REMEMBERED)(self._compile)

    async def constraint(self, schema: dict[str, Any] | None) -> Callable[[], TokenConstraint] | None:
        """What makes the constraint of an answer that follows `schema`; None for None.

        Raises:
            ApiError: the schema is wrong, too large or too complex, or holds what is not supported.
        """
        if schema is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._maker, schema)

    def _maker(self, schema: dict[str, Any]) -> Callable[[], TokenConstraint]:
        if find_spec("llguidance") is None:
            raise _refused("this server cannot do it: it lacks the package llguidance", "unsupported_parameter")
        if not self._ends:
            raise _refused("this model has no token that ends an answer", "unsupported_parameter")
        text = json.dumps(schema, separators=(",", ":"))
        if len(text) > MAX_SCHEMA_BYTES:
            raise _refused(f"the schema has more than {MAX_SCHEMA_BYTES:,} bytes")
        matcher = self._compiled(text)
        return lambda: JsonConstraint(matcher.deep_copy(), self._vocab_size)

    def _compile(self, schema: str) -> LLMatcher:
        from llguidance import LLMatcher

        found = problem(schema)
        if not found:
            matcher = LLMatcher(self._tokenizer, grammar_of(schema), log_level=0, limits=limits())
            # Some schemas turn out to be too complex only where tokens are asked for.
            matcher.compute_bitmask()
            found = matcher.get_error().removesuffix("<non-verbose/>")
        if found:
            raise _refused(f"the schema cannot be followed: {' '.join(found.split())[:_MESSAGE_LENGTH]}")
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        def encode(text: str) -> list[int]:
            tokens: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return tokens

        vocabulary = _Vocabulary(encode, [self._table[i] for i in range(self._vocab_size)], self._ends[0])
        vocabulary.tree = LLTokenizer(
            TokenizerWrapper(vocabulary), eos_token=self._ends, slices=LLTokenizer.json_slices()
        )
        return vocabulary.tree


def _refused(why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"Invalid value for 'response_format': {why}", param="response_format", code=code)
