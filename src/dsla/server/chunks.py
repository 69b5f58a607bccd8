"""The objects of a stream and of an answer in one piece, from pieces of text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

from dsla.server.generation import Piece, TokenReport
from dsla.server.logprobs import LogprobWriter
from dsla.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    FinishReason,
    TextChoice,
    Usage,
)

Pieces = AsyncIterable[tuple[int, Piece]]


class AnswerWriter:
    """Writes the answers to one request; choice `prompt * n + i` is answer `i` to a prompt.

    Args:
        model: name of the model.
        chat: a chat completion, not a completion.
        prompts: prompts of the request.
        n: answers to each.
        logprobs: writes probabilities, or None where they are not asked for.
    """

    def __init__(self, model: str, chat: bool, prompts: int, n: int, logprobs: LogprobWriter | None) -> None:
        self._model, self._chat, self._count, self._n, self._logprobs = model, chat, prompts * n, n, logprobs
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def answer(self, pieces: Pieces) -> ChatCompletion | Completion:
        """The whole answer, once all pieces are there."""
        texts: list[list[str]] = [[] for _ in range(self._count)]
        reports: list[list[TokenReport]] = [[] for _ in range(self._count)]
        last: dict[int, Piece] = {}
        async for index, piece in pieces:
            texts[index].append(piece.text)
            reports[index] += piece.reports
            last[index] = piece
        common: dict[str, Any] = {
            "id": self._id,
            "created": self._created,
            "model": self._model,
            "usage": self._usage(last),
            "dsla": last[0].dsla if self._count == 1 else None,
        }
        parts = [("".join(texts[index]), reports[index], last[index]) for index in range(self._count)]
        if self._chat:
            return ChatCompletion(choices=[self._chat_choice(i, *part) for i, part in enumerate(parts)], **common)
        return Completion(choices=[self._text_choice(i, *part) for i, part in enumerate(parts)], **common)

    def _chat_choice(self, index: int, text: str, reports: Sequence[TokenReport], piece: Piece) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(content=text),
            logprobs=self._logprobs.chat(reports) if self._logprobs else None,
            finish_reason=_reason(piece),
            dsla=None if self._count == 1 else piece.dsla,
        )

    def _text_choice(self, index: int, text: str, reports: Sequence[TokenReport], piece: Piece) -> TextChoice:
        return TextChoice(
            index=index,
            text=text,
            logprobs=self._logprobs.text(reports) if self._logprobs else None,
            finish_reason=_reason(piece),
            dsla=None if self._count == 1 else piece.dsla,
        )

    async def chunks(
        self, pieces: Pieces, include_usage: bool, stream_levels: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream.

        Args:
            pieces: pieces of text as they come.
            include_usage: end with a chunk that has the usage and no choice.
            stream_levels: tell in each chunk which levels the answer has had so far, not in the last one only.
        """
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        last: dict[int, Piece] = {}
        for index in range(self._count if self._chat else 0):
            yield self._chunk([_choice(index, delta={"role": "assistant", "content": ""})]) | usage
        async for index, piece in pieces:
            last[index] = piece
            for choice in self._choices(index, piece):
                yield self._chunk([choice], piece if stream_levels or choice["finish_reason"] else None) | usage
        if include_usage:
            end = {"usage": self._usage(last).model_dump()}
            yield self._chunk([], last[0] if self._count == 1 else None) | end

    def _choices(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if not self._chat:
            logprobs = self._logprobs.text(piece.reports).model_dump() if self._logprobs else None
            return [_choice(index, piece.finish_reason, logprobs, text=piece.text)]
        choices = []
        if piece.text or piece.reports:
            logprobs = self._logprobs.chat(piece.reports).model_dump() if self._logprobs else None
            choices.append(_choice(index, None, logprobs, delta={"content": piece.text}))
        if piece.finish_reason:
            choices.append(_choice(index, piece.finish_reason, delta={}))
        return choices

    def _chunk(self, choices: list[dict[str, Any]], piece: Piece | None = None) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        return chunk | {"dsla": piece.dsla.model_dump()} if piece else chunk

    def _usage(self, last: dict[int, Piece]) -> Usage:
        """A prompt counts once, however many answers it has; what none of them had to compute of it is cached."""
        firsts = range(0, self._count, self._n)
        return Usage.of(
            sum(last[first].prompt_tokens for first in firsts),
            sum(piece.completion_tokens for piece in last.values()),
            sum(min(last[first + i].cached_tokens for i in range(self._n)) for first in firsts),
        )


def _choice(
    index: int, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None, **content: Any
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _reason(piece: Piece) -> FinishReason:
    if piece.finish_reason is None:
        raise ValueError("a stream of text ended without a reason: this is a bug in dsla")
    return piece.finish_reason
