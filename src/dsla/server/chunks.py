"""The objects of a stream and of an answer in one piece, from pieces of text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from dsla.server.generation import Piece
from dsla.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    FinishReason,
    TextChoice,
    Usage,
)

Pieces = AsyncIterator[tuple[int, Piece]]


class AnswerWriter:
    """Writes the answers to one request.

    Args:
        model: name of the model.
        chat: a chat completion, not a completion.
        count: prompts of the request.
    """

    def __init__(self, model: str, chat: bool, count: int) -> None:
        self._model, self._chat, self._count = model, chat, count
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def answer(self, pieces: Pieces) -> ChatCompletion | Completion:
        """The whole answer, once all pieces are there."""
        texts: dict[int, list[str]] = {index: [] for index in range(self._count)}
        last: dict[int, Piece] = {}
        async for index, piece in pieces:
            texts[index].append(piece.text)
            last[index] = piece
        parts = [("".join(texts[index]), last[index]) for index in range(self._count)]
        return self._chat_answer(*parts[0]) if self._chat else self._text_answer(parts, _usage(last))

    def _chat_answer(self, text: str, piece: Piece) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[ChatChoice(index=0, message=AssistantMessage(content=text), finish_reason=_reason(piece))],
            usage=_usage({0: piece}),
            dsla=piece.dsla,
        )

    def _text_answer(self, parts: list[tuple[str, Piece]], usage: Usage) -> Completion:
        single = len(parts) == 1
        choices = [
            TextChoice(index=index, text=text, finish_reason=_reason(piece), dsla=None if single else piece.dsla)
            for index, (text, piece) in enumerate(parts)
        ]
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            dsla=parts[0][1].dsla if single else None,
        )

    async def chunks(self, pieces: Pieces, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream.

        Args:
            pieces: pieces of text as they come.
            include_usage: end with a chunk that has the usage and no choice.
        """
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        last: dict[int, Piece] = {}
        if self._chat:
            yield self._chunk([_choice(0, delta={"role": "assistant", "content": ""})]) | usage
        async for index, piece in pieces:
            last[index] = piece
            if not self._chat:
                choice = _choice(index, piece.finish_reason, text=piece.text)
                yield self._chunk([choice], piece if piece.finish_reason else None) | usage
                continue
            if piece.text:
                yield self._chunk([_choice(0, delta={"content": piece.text})]) | usage
            if piece.finish_reason:
                yield self._chunk([_choice(0, piece.finish_reason, delta={})], piece) | usage
        if include_usage:
            yield self._chunk([], last[0] if self._count == 1 else None) | {"usage": _usage(last).model_dump()}

    def _chunk(self, choices: list[dict[str, Any]], piece: Piece | None = None) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        return chunk | {"dsla": piece.dsla.model_dump()} if piece else chunk


def _choice(index: int, finish_reason: str | None = None, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(last: dict[int, Piece]) -> Usage:
    pieces = last.values()
    return Usage.of(sum(p.prompt_tokens for p in pieces), sum(p.completion_tokens for p in pieces))


def _reason(piece: Piece) -> FinishReason:
    if piece.finish_reason is None:
        raise ValueError("a stream of text ended without a reason: this is a bug in dsla")
    return piece.finish_reason
