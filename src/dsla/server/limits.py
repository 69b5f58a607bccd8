"""How much one request, one caller, and all together may take: bytes of bodies, time to send one, requests open at once."""

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

BODIES = 32
"""As many times the bytes of the longest body that is taken, those of all open requests may have together."""


class Limits:
    """ASGI middleware.

    Args:
        app: what is limited.
        settings: the limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._open: Counter[str] = Counter()
        self._bytes = 0

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
            await self._app(scope, self._bounded(receive, exchange, is_admin(scope)), send)
        finally:
            # Only now: the body, and what was read from it, is there until the answer has ended.
            self._open[exchange.caller] -= 1
            self._bytes -= exchange.body_bytes

    def _bounded(self, receive: Receive, exchange: Exchange, for_admin: bool) -> Receive:
        """`receive`, until the body is there: no more bytes, and no longer, than it may take."""
        seconds, there = self._settings.request_seconds, False
        most, most_together = self._settings.max_body_bytes, BODIES * self._settings.max_body_bytes

        async def bounded() -> Message:
            nonlocal there
            if there:
                return await receive()
            try:
                async with asyncio.timeout_at(None if seconds is None else exchange.began + seconds):
                    message = await receive()
            except TimeoutError:
                # FastAPI lets nothing but its own exceptions out of the reading of a body.
                raise HTTPException(408, "The body did not come in time; send it faster") from None
            count = len(message.get("body", b""))
            exchange.body_bytes, self._bytes = exchange.body_bytes + count, self._bytes + count
            there = not message.get("more_body", False)
            if exchange.body_bytes > most:
                raise HTTPException(413, self._too_large().message)
            if self._bytes > most_together and not for_admin:
                raise HTTPException(429, "The bodies of all open requests are too many bytes together; try again later")
            return message

        return bounded

    def _too_large(self) -> ApiError:
        most = self._settings.max_body_bytes
        return ApiError(413, f"The body is too large: at most {most} bytes are taken", code="body_too_large")
