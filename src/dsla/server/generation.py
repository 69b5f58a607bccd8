"""From an engine's tokens to pieces of text: detokenizing, stop strings, several prompts at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from dsla.engine import RequestStream, StepOutput, TokenLogprobs
from dsla.errors import BusyError, EngineError
from dsla.server.detokenize import Detokenizer, TokenBytes
from dsla.server.errors import ApiError, busy, internal_error, timed_out, unavailable
from dsla.server.exchange import Exchange
from dsla.server.responses import DslaInfo, FinishReason
from dsla.server.stop import StopStrings

logger = logging.getLogger(__name__)

_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}

T = TypeVar("T")


@dataclass(frozen=True)
class TokenReport:
    """The probability of a token of the answer.

    Attributes:
        offset: place of its first character in the text of the answer.
        logprobs: its `(token, logprob)`, then those of the most likely tokens.
    """

    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class Piece:
    """Text that one or more tokens completed.

    Attributes:
        text: new text, may be empty in the last piece.
        finish_reason: None before the last piece.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated so far.
        cached_tokens: tokens of the prompt that an earlier request had computed.
        levels: level history so far.
        folded_tokens: cached tokens turned into states so far.
        reports: of the tokens whose text began to be sent, where the request asks for probabilities. All tokens of the
            text have one in the end; those that lie wholly in a stop text have none.
    """

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    levels: list[list[int]]
    folded_tokens: int
    reports: tuple[TokenReport, ...] = ()

    @property
    def dsla(self) -> DslaInfo:
        """Level history and folded tokens, as they are told."""
        return DslaInfo(levels=self.levels, folded_tokens=self.folded_tokens)


async def text_pieces(
    outputs: RequestStream, table: TokenBytes, stops: Sequence[str] = ()
) -> AsyncGenerator[Piece, None]:
    """Text of one request; closes `outputs`, which frees the request, however it ends, at a stop text at once.

    Args:
        outputs: what the engine generates for it.
        table: bytes of the tokens.
        stops: stop strings; the text ends before the first one.

    Raises:
        ApiError: the engine failed, or it took too long.
    """
    detokenizer, stop = Detokenizer(table), StopStrings(stops)
    count = read = sent = 0
    waiting: deque[TokenReport] = deque()

    def piece(out: StepOutput, text: str, reason: FinishReason | None, tokens: int, stopped: bool = False) -> Piece:
        nonlocal sent
        sent += len(text)
        reports = []
        while waiting and (waiting[0].offset < sent or (reason and not stopped)):
            reports.append(waiting.popleft())
        return Piece(
            text, reason, out.prompt_tokens, tokens, out.cached_tokens, out.levels, out.folded_tokens, tuple(reports)
        )

    try:
        async for out in outputs:
            text = ""
            for place, token in enumerate(out.tokens):
                count += 1
                added = detokenizer.add((token,))
                if out.logprobs is not None:
                    waiting.append(TokenReport(read + _begin(added, table[token]), out.logprobs[place]))
                read += len(added)
                new, stopped = stop.add(added)
                text += new
                if stopped:
                    outputs.stop()
                    yield piece(out, text, "stop", count, stopped)
                    return
            reason = _REASONS.get(out.finish_reason)
            if reason is not None:
                new, stopped = stop.add(detokenizer.finish())
                text += new if stopped else new + stop.finish()
                yield piece(out, text, "stop" if stopped else reason, out.completion_tokens, stopped)
                return
            if out.finish_reason is not None:
                raise _failure(out)
            if text:
                yield piece(out, text, None, out.completion_tokens)
        raise internal_error()
    except TimeoutError as error:
        raise timed_out() from error
    except BusyError as error:
        raise busy() from error
    except EngineError as error:
        raise unavailable() from error
    finally:
        await outputs.aclose()


def _begin(added: str, content: bytes) -> int:
    """Place in the text that a token added at which its own begins: after what became of a character broken off before it.

    A token that is no text by itself belongs to the character that it goes on with or begins.
    """
    try:
        return len(added) - len(content.decode())
    except UnicodeDecodeError:
        return 0


def _failure(out: StepOutput) -> ApiError:
    if out.finish_reason == "abort":
        return ApiError(503, "The request was cancelled by the server", code="cancelled")
    logger.error("request %s failed; GET /admin/events says why", out.request_id)
    # The message of an error that nobody foresaw may hold anything.
    logger.debug("request %s: %s", out.request_id, out.error)
    return internal_error()


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of several streams as they are taken, with the index of their stream; closes all, however it ends."""
    if len(streams) == 1:  # needs no task and no queue for each item, and waits where its reader does
        async with aclosing(streams[0]) as stream:
            async for only in stream:
                yield 0, only
        return
    # A stream waits until its item is taken: what a slow reader leaves gathers where it is smallest, in the engine's outputs.
    queue: asyncio.Queue[tuple[int, T, asyncio.Event] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        taken = asyncio.Event()
        async with aclosing(stream):
            async for item in stream:
                taken.clear()
                queue.put_nowait((index, item, taken))
                await taken.wait()

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            found = await queue.get()
            if isinstance(found, asyncio.Task):
                found.result()
                running -= 1
            else:
                index, item, taken = found
                taken.set()
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def counted(
    pieces: AsyncGenerator[tuple[int, Piece], None], exchange: Exchange
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The same pieces; their tokens are counted as those of the exchange. Closes `pieces`."""
    known: dict[int, int] = {}
    async with aclosing(pieces):
        async for index, piece in pieces:
            exchange.completion_tokens += piece.completion_tokens - known.get(index, 0)
            known[index] = piece.completion_tokens
            yield index, piece


class Answers:
    """Pieces of all answers to a request, with the index of their answer. To be closed: that ends what has not ended.

    A generator that was never begun closes nothing, so that the outputs are closed here once more.

    Args:
        outputs: what the engine generates, an answer each.
        table: bytes of the tokens.
        stops: stop strings.
        exchange: the request.
    """

    def __init__(
        self, outputs: Sequence[RequestStream], table: TokenBytes, stops: Sequence[str], exchange: Exchange
    ) -> None:
        self._outputs = outputs
        self._pieces = counted(merged([text_pieces(each, table, stops) for each in outputs]), exchange)

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        return self._pieces

    async def aclose(self) -> None:
        """Ends all requests."""
        await self._pieces.aclose()
        await close_all(self._outputs)


async def close_all(outputs: Sequence[RequestStream]) -> None:
    """Closes all, whether begun or not."""
    for each in outputs:
        await each.aclose()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
