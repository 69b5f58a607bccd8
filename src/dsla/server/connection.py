"""A connection that nobody keeps open for nothing: bounds on the time a request's head may take, and on the time in which a
client must take what it is sent. Bodies and whole requests have their bounds in `limits.py`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""From when a connection is opened, or the first byte of its next request, until that request's head must be there."""

TAKE_SECONDS = 60.0
"""As long as this a client may take nothing while more than the buffers hold waits for it."""


class Connection(H11Protocol):
    """Serves one connection, and closes it where the client is too slow."""

    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taking = _cancelled(self._taking)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head, self._taking = _cancelled(self._head), _cancelled(self._taking)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _late(self) -> None:
        self._head = None
        if not self._answering:
            self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What stands in place of a timer once it is cancelled: nothing."""
    if timer is not None:
        timer.cancel()
    return None
