"""Outputs of one request on their way from the engine's thread to whoever reads them, in an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from dsla.engine.request import StepOutput

LEFT, LATE = "client left", "deadline"
"""Why a request was cancelled: nobody reads its outputs any more, or it took too long."""

_logger = logging.getLogger(__name__)


class Mailbox:
    """Where a request's outputs go: to the event loop that asked for it.

    What nobody has taken yet grows into one output while the levels stay, so that a slow reader costs a few bytes a token.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: deque[StepOutput | Exception] = deque()
        self._there = asyncio.Event()

    def add(self, item: StepOutput | Exception) -> None:
        """Adds an output; in the event loop only."""
        last = self._items[-1] if self._items else None
        if (
            isinstance(item, StepOutput)
            and isinstance(last, StepOutput)
            and item.finish_reason is None
            and item.levels == last.levels
        ):
            self._items[-1] = last.joined(item)
        else:
            self._items.append(item)
        self._there.set()

    async def get(self) -> StepOutput:
        """The next output; raises the error that came in place of one."""
        if not self._items:
            self._there.clear()
            await self._there.wait()
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


def post(parts: Sequence[tuple[Mailbox, StepOutput | Exception]]) -> None:
    """Hands outputs over, from any thread: each event loop is woken once for all of its own."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, StepOutput | Exception]]] = {}
    for part in parts:
        by_loop.setdefault(part[0].loop, []).append(part)
    for loop, its in by_loop.items():
        try:
            loop.call_soon_threadsafe(_add_all, its)
        except RuntimeError:
            _logger.debug("outputs were dropped: their event loop is closed")


def _add_all(parts: Sequence[tuple[Mailbox, StepOutput | Exception]]) -> None:
    for mailbox, item in parts:
        mailbox.add(item)


class RequestStream(AsyncIterator[StepOutput]):
    """Outputs of one request as they come; the last one has a `finish_reason`.

    The request is added when the first one is awaited. Whoever stops reading earlier closes the stream, which ends the request
    within a step, as does the end of a task that waits here. Unlike a generator it can be closed before it was begun.

    Args:
        begin: adds the request, whose outputs then come to the mailbox.
        leave: ends it; called once, unless it has ended by itself, with why it is cancelled, or None where it is to end as if
            by itself.
        deadline: time of the event loop's clock, seconds, at which it is cancelled and `TimeoutError` raised; None = never.
    """

    def __init__(
        self, begin: Callable[[Mailbox], None], leave: Callable[[str | None], None], deadline: float | None
    ) -> None:
        self._begin, self._leave, self._deadline = begin, leave, deadline
        self._mailbox: Mailbox | None = None
        self._late: asyncio.TimerHandle | None = None
        self._over = False

    async def __anext__(self) -> StepOutput:
        if self._over:
            raise StopAsyncIteration
        try:
            output = await (self._mailbox or self._begun()).get()
        except BaseException as error:
            self._close(LATE if isinstance(error, TimeoutError) else LEFT)
            raise
        if output.finish_reason is not None:
            self._end()
        return output

    def stop(self) -> None:
        """Ends the request with `stop`, as an end token would: its reader has found the end in the text."""
        self._close(None)

    async def aclose(self) -> None:
        """Cancels the request, unless it has ended."""
        self._close(LEFT)

    def __del__(self) -> None:
        self._close(LEFT)

    def _begun(self) -> Mailbox:
        mailbox = self._mailbox = Mailbox()
        self._begin(mailbox)
        if self._deadline is not None:
            self._late = mailbox.loop.call_at(self._deadline, mailbox.add, TimeoutError())
        return mailbox

    def _close(self, why: str | None) -> None:
        if not self._over:
            self._end()
            self._leave(why)

    def _end(self) -> None:
        self._over = True
        if self._late is not None:
            self._late.cancel()
