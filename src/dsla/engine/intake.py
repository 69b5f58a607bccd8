"""From what a caller asks to a request the engine can run, or an error that says what to change."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Collection, Sequence

from dsla.engine.decoder import PackedDecoder
from dsla.engine.request import Request
from dsla.engine.sampling import SamplingParams
from dsla.errors import RequestError

QUALITY: dict[str, float] = {"full": 0.0, "balanced": 0.5, "fast": 1.0}
"""Quality -> the largest part of the convertible layers that may be converted."""


def level_bounds(quality: str | None, min_level: int | None, max_level: int | None, n_levels: int) -> tuple[int, int]:
    """The levels a request may have.

    Args:
        quality: a key of `QUALITY`, or None.
        min_level: level it starts at, at least; None = 0.
        max_level: level it is never raised above; None = what `quality` says, else `n_levels`.
        n_levels: levels of the model.

    Returns:
        `(min_level, max_level)`.

    Raises:
        RequestError: if the quality is unknown, given beside `max_level`, or a level is out of range.
    """
    if quality is not None:
        if quality not in QUALITY:
            raise RequestError(f"quality must be one of {', '.join(QUALITY)}, found {quality!r}", param="quality")
        if max_level is not None:
            raise RequestError("give quality or max_level, not both", param="max_level")
        max_level = int(QUALITY[quality] * n_levels)
    low, high = min_level or 0, n_levels if max_level is None else max_level
    for name, level in (("min_level", low), ("max_level", high)):
        if not 0 <= level <= n_levels:
            raise RequestError(
                f"{name} must be in 0 ... {n_levels}, the levels of this model, found {level}", param=name
            )
    if low > high:
        raise RequestError(f"min_level {low} is above the highest level allowed, {high}", param="min_level")
    return low, high


def build_request(
    prompt: Sequence[int],
    params: SamplingParams,
    request_id: str | None,
    levels: tuple[int, int],
    decoder: PackedDecoder,
    open_ended_tokens: int,
    worth_keeping: int,
) -> Request:
    """Builds a request.

    Args:
        prompt: token ids.
        params: sampling.
        request_id: its name, or None for a random one.
        levels: `(min_level, max_level)`.
        decoder: the model it is for.
        open_ended_tokens: tokens to generate at most where `params` does not say.
        worth_keeping: tokens from which on its states are worth keeping for others.

    Raises:
        RequestError: if the prompt is empty, it or `params` hold unknown tokens, or it exceeds the model's context with its
            answer.
    """
    _check_vocabulary(params, decoder.vocab_size)
    if not prompt:
        raise RequestError("the prompt has no tokens: give at least one", param="prompt")
    unknown = next((token for token in prompt if not 0 <= token < decoder.vocab_size), None)
    if unknown is not None:
        raise RequestError(
            f"the prompt holds token id {unknown}, the model knows 0 to {decoder.vocab_size - 1}", param="prompt"
        )
    room = decoder.max_tokens - len(prompt)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the model's context of {decoder.max_tokens} leaves no room to "
            "answer: shorten it",
            param="prompt",
        )
    max_tokens = min(room, open_ended_tokens) if params.max_tokens is None else params.max_tokens
    if max_tokens > room:
        raise RequestError(
            f"a prompt of {len(prompt)} tokens and max_tokens {max_tokens} exceed the model's context of "
            f"{decoder.max_tokens} tokens: lower max_tokens to {room} or shorten the prompt",
            param="max_tokens",
        )
    own_ends = () if params.ignore_eos else decoder.eos_token_ids
    end_tokens = frozenset(token for token in (*params.stop_token_ids, *own_ends) if token < decoder.vocab_size)
    if params.min_tokens and len(end_tokens) == decoder.vocab_size:
        raise RequestError("every token of the model ends the request: none is left for min_tokens", param="min_tokens")
    return Request(
        id=request_id if request_id is not None else uuid.uuid4().hex,
        prompt=list(prompt),
        params=params,
        max_tokens=max_tokens,
        seed=params.seed if params.seed is not None else secrets.randbits(63),
        min_level=levels[0],
        max_level=levels[1],
        end_tokens=end_tokens,
        message_ends=message_ends(prompt, decoder.eos_token_ids, worth_keeping),
    )


def message_ends(prompt: Sequence[int], ends: Collection[int], least: int) -> tuple[int, ...]:
    """Where some messages of a prompt end, in tokens: the first that does after `least` tokens, and the last two; but for
    the prompt's own end.

    What lies before is what other prompts have in common with it: the same instructions, the same conversation with another
    last message, and the very same, to be answered once more.

    Args:
        prompt: token ids.
        ends: the model's end tokens, which its chat template writes after each message.
        least: ends before so many tokens do not count.
    """
    found = [i for i in range(max(least, 1), len(prompt)) if prompt[i - 1] in ends]
    return tuple(sorted({*found[:1], *found[-2:]}))


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise RequestError(f"{name} holds token id {unknown}, the model knows 0 to {vocab_size - 1}", param=name)
