"""Answers that are JSON of a schema: llguidance says which tokens may come next.

It is told the bytes that the detokenizer knows, so that what it lets through is what the client reads.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsla.engine import TokenConstraint
from dsla.errors import EngineError
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import ApiError, busy
from dsla.server.latest import Latest
from dsla.server.schema_check import grammar_of, limits, problem

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_BYTES = 1 << 17
"""Bytes of a schema, at most, written in ASCII and without spaces."""

MAX_WAITING = 8
"""Schemas that are compiled or wait for it, at most."""

REFUSED_SECONDS = 60.0
"""How long a schema that was refused is refused at once: a busy machine may have been what made it take too long."""

_MESSAGE_LENGTH = 200
_REMEMBERED, _REMEMBERED_REFUSALS = 16, 256


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


@dataclass
class _Job:
    """A schema that is compiled or waits for it, and for how many."""

    matcher: asyncio.Future[LLMatcher]
    readers: int = 0


class JsonSchemas:
    """Compiles schemas for the tokens of one model, one after the other, in a thread of its own.

    Those it knows, the good ones and the bad, wait for none that is being compiled.

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
        self._jobs: dict[str, _Job] = {}
        self._compiled = Latest[bytes, "LLMatcher"](_REMEMBERED)
        self._refusals = Latest[bytes, tuple[float, str]](_REMEMBERED_REFUSALS)

    async def constraint(self, schema: dict[str, Any] | None) -> Callable[[], TokenConstraint] | None:
        """What makes the constraint of an answer that follows `schema`; None for None. Cancelled, it leaves the queue.

        Raises:
            ApiError: the schema is wrong, too large or too complex, or holds what is not supported; or too many wait.
        """
        if schema is None:
            return None
        if find_spec("llguidance") is None:
            raise _refused("this server cannot do it: it lacks the package llguidance", "unsupported_parameter")
        if not self._ends:
            raise _refused("this model has no token that ends an answer", "unsupported_parameter")
        text = _text(schema)
        matcher = self._known(text)
        if matcher is None:
            matcher = await self._once(text)
        return lambda: JsonConstraint(matcher.deep_copy(), self._vocab_size)

    async def _once(self, text: str) -> LLMatcher:
        """Compiles a schema once for all who wait for it; with the last of them it leaves the queue."""
        job = self._jobs.get(text)
        if job is None:
            if len(self._jobs) >= MAX_WAITING:
                raise busy()
            # It may still be compiled for those that have left.
            future = self._thread.submit(lambda: self._known(text) or self._compile(text))
            job = self._jobs[text] = _Job(asyncio.wrap_future(future))
        job.readers += 1
        try:
            return await asyncio.shield(job.matcher)
        finally:
            job.readers -= 1
            if not job.readers:
                job.matcher.cancel()
                del self._jobs[text]

    def _known(self, text: str) -> LLMatcher | None:
        refused = self._refusals.get(_key(text))
        if refused is not None and time.monotonic() < refused[0]:
            raise _refused(refused[1])
        return self._compiled.get(_key(text))

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher

        found = problem(text)
        if not found:
            matcher = LLMatcher(self._tokenizer, grammar_of(text), log_level=0, limits=limits())
            # Some schemas turn out to be too complex only where tokens are asked for.
            matcher.compute_bitmask()
            found = matcher.get_error().removesuffix("<non-verbose/>")
        if found:
            why = f"the schema cannot be followed: {' '.join(found.split())[:_MESSAGE_LENGTH]}"
            self._refusals.add(_key(text), (time.monotonic() + REFUSED_SECONDS, why))
            raise _refused(why)
        self._compiled.add(_key(text), matcher)
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


def _text(schema: dict[str, Any]) -> str:
    try:
        text = json.dumps(schema, separators=(",", ":"))
    except RecursionError:
        raise _refused("the schema is nested too deep") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise _refused(f"the schema has more than {MAX_SCHEMA_BYTES:,} bytes")
    return text


def _key(text: str) -> bytes:
    """What a schema is known by: its text may be long."""
    return sha256(text.encode()).digest()


def _refused(why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"Invalid value for 'response_format': {why}", param="response_format", code=code)
