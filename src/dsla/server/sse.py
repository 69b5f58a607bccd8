"""Server-sent events: one JSON object an event, `[DONE]` at the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dsla.server.errors import ApiError, internal_error

_LINE_ENDS = [(character.encode(), b"\\u%04x" % ord(character)) for character in "\x85\u2028\u2029"]
"""What ends a line of text but none of an event, and what stands for it: clients that read lines of text cut events there."""

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """What holds something until it is closed."""

    async def aclose(self) -> object: ...


class EventStream(StreamingResponse):
    """Sends objects as they come. An error after the first one becomes an event with the error's body, and the end.

    Args:
        chunks: objects to send.
        source: what `chunks` reads from. Closed when the response ends, also one that the client never read.
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], source: Closable) -> None:
        super().__init__(_events(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield _event(internal_error().body())
    else:
        yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    content = to_json(data)
    for character, escape in _LINE_ENDS:
        content = content.replace(character, escape)
    return b"data: " + content + b"\n\n"
