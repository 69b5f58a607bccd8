"""How much one request, and one caller, may take: bytes of a body, time to send it, requests open at once."""

from __future__ import annotations

import asyncio
from collections import Counter

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsla.server.errors import ApiError
from dsla.server.exchange import Exchange
from dsla.server.gate import is_admin
from dsla.server.settings import ServerSettings


class Limits:
    """ASGI middleware.

    Args:
        app: what is limited.
        settings: the limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        exchange, most = Exchange.of(scope), None if is_admin(scope) else self._settings.max_concurrent
        try:
            length = Headers(scope=scope).get("content-length", "")
            if length.isdecimal() and int(length) > self._settings.max_body_bytes:
                raise self._too_large()
            if most is not None and self._open[exchange.caller] >= most:
                message = f"Too many requests at once: this caller may have {most} open; try again when one has ended"
                raise ApiError(429, message, code="too_many_requests")
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._open[exchange.caller] += 1
        try:
            await self._app(scope, self._bounded(receive, exchange), send)
        finally:
            self._open[exchange.caller] -= 1

    def _bounded(self, receive: Receive, exchange: Exchange) -> Receive:
        """`receive`, until the body is there: no more bytes, and no longer, than it may take."""
        seconds, read, there = self._settings.request_seconds, 0, False

        async def bounded() -> Message:
            nonlocal read, there
            if there:
                return await receive()
            try:
                async with asyncio.timeout_at(None if seconds is None else exchange.began + seconds):
                    message = await receive()
            except TimeoutError:
                # FastAPI lets nothing but its own exceptions out of the reading of a body.
                raise HTTPException(408, "The body did not come in time; send it faster") from None
            read += len(message.get("body", b""))
            there = not message.get("more_body", False)
            if read > self._settings.max_body_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        return bounded

    def _too_large(self) -> ApiError:
        most = self._settings.max_body_bytes
        return ApiError(413, f"The body is too large: at most {most} bytes are taken", code="body_too_large")
