"""Event streams: what is sent, and that their source is closed whatever the client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from dsla.server.errors import ApiError
from dsla.server.sse import EventStream

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


class Source:
    """A stream of objects that knows whether it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.closed = count, error, False

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            for number in range(self.count):
                yield {"n": number, "text": "é\u2028\x85\n"}
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def respond(source: Source, leave_after: int | None = None) -> str:
    """Runs a response; the client stops reading after so many messages, and leaves."""
    sent: list[Any] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()
            await asyncio.Event().wait()

    stream = source.stream()
    await anext(stream)

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        async for chunk in stream:
            yield chunk

    if leave_after == 0:
        gone.set()
    await EventStream(chunks(), stream)(SCOPE, receive, send)
    assert source.closed
    return b"".join(message.get("body", b"") for message in sent).decode()


def test_every_object_is_one_event() -> None:
    text = asyncio.run(respond(Source(3)))
    events = [f'data: {{"n":{n},"text":"é\\u2028\\u0085\\n"}}\n\n' for n in (1, 2)]
    assert text == "".join(events) + "data: [DONE]\n\n"
    assert text.splitlines() == text.rstrip("\n").split("\n") + [""], (
        "clients that read lines of text find the same ones"
    )


@pytest.mark.parametrize("leave_after", [0, 1, 5])
def test_a_client_that_leaves_closes_the_source(leave_after: int) -> None:
    text = asyncio.run(respond(Source(10**6), leave_after))
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("error", "code"),
    [(ApiError(503, "m", code="engine_stopped"), "engine_stopped"), (ValueError("secret"), "internal_error")],
)
def test_an_error_is_the_last_event(error: Exception, code: str) -> None:
    text = asyncio.run(respond(Source(2, error)))
    assert f'"code":"{code}"' in text.split("\n\n")[-2]
    assert "secret" not in text
    assert "[DONE]" not in text
