"""What llguidance makes of a schema, and whether it comes to an end with it: `python -m dsla.server.schema_check < SCHEMA`.

llguidance bounds most of its work, but the time for an `allOf` of many patterns doubles with each. A thread cannot be stopped,
a process can: schemas are tried in one of their own before the server compiles them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits
    from llguidance._lib import JsonCompileOptions

MAX_SYMBOLS, MAX_LEXER_STATES = 100_000, 20_000
"""Of a compiled schema, at most; a state of the lexer takes one to two kB."""

SECONDS, MEMORY = 3.0, 1 << 30
"""Time of a trial, at most, the start of its process included, and bytes of that process."""

_JSON: JsonCompileOptions = {
    # Bounded: a model that has nothing to say would write spaces for ever.
    "whitespace_pattern": r"\n?[ ]{0,32}",
    # The rest is llguidance's own, said here because a schema could say otherwise under `x-guidance`.
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}


def grammar_of(schema: str) -> str:
    """The grammar of a JSON Schema.

    Raises:
        ValueError: it is none.
    """
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)


def limits() -> LLParserLimits:
    """Bounds of llguidance's work."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=MAX_SYMBOLS,
        max_lexer_states=MAX_LEXER_STATES,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def problem(schema: str) -> str:
    """What is wrong with a JSON Schema, `""` where nothing is; runs a process for at most `SECONDS`.

    Raises:
        CalledProcessError: the process failed for no reason that lies in the schema.
    """
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(command, input=schema.encode(), capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile: use fewer patterns, and less of `allOf`"
    if done.returncode < 0:
        return "it takes too much memory to compile"
    done.check_returncode()
    return done.stdout.decode()


def _main() -> None:
    from llguidance import LLMatcher

    with contextlib.suppress(ImportError):  # Windows knows no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        wrong, messages = LLMatcher.validate_grammar_with_warnings(
            grammar_of(sys.stdin.buffer.read().decode()), limits=limits()
        )
    except ValueError as error:
        wrong, messages = True, [str(error)]
    if wrong:
        sys.stdout.buffer.write(messages[0].encode())


if __name__ == "__main__":
    _main()
