"""The outermost layer: every answer gets an id and security headers, a line in the log, and a place in the metrics.

It also turns what nobody foresaw into a 500 without details.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsla.server.errors import internal_error
from dsla.server.exchange import Exchange, request_id
from dsla.server.pages import PAGES

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
"""Headers of every answer that has none of the name itself."""

QUIET = frozenset({"/health", "/ready", "/metrics", "/admin/state"}) | PAGES
"""Paths that machines and the dashboard ask all the time: lines of answers that are not refusals have the level `debug`."""

_MAX_PATH = 200
_NO_ANSWER = 499
_REFUSED = (401, 403)

logger = logging.getLogger(__name__)


class Access:
    """ASGI middleware, around all others.

    Args:
        app: the application.
        count: called with the route, the status and the seconds of every answer. The route is the template, as
            `/v1/models/{model:path}`, or `other` where there is none.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int, float], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        exchange = Exchange(request_id(Headers(scope=scope).get("x-request-id")), loop.time())
        scope.setdefault("state", {})["exchange"] = exchange
        status, ended = _NO_ANSWER, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = exchange.id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("request %s failed", exchange.id, extra={"fields": {"request_id": exchange.id}})
            if status == _NO_ANSWER:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            seconds = loop.time() - exchange.began
            self._count(getattr(scope.get("route"), "path", "other"), status, seconds)
            _log(scope, exchange, status, seconds, ended)


def _log(scope: Scope, exchange: Exchange, status: int, seconds: float, ended: bool) -> None:
    path = scope["path"].encode("unicode_escape").decode()[:_MAX_PATH]
    fields = {
        "request_id": exchange.id,
        "caller": exchange.caller,
        "method": scope["method"],
        "path": path,
        "status": status,
        "seconds": round(seconds, 4),
        "prompt_tokens": exchange.prompt_tokens,
        "completion_tokens": exchange.completion_tokens,
        "complete": ended,
    }
    logger.log(
        logging.DEBUG if scope["path"] in QUIET and status not in _REFUSED else logging.INFO,
        "%s %s %d, %.3f s, %d + %d tokens, id %s, %s%s",
        scope["method"],
        path,
        status,
        seconds,
        exchange.prompt_tokens,
        exchange.completion_tokens,
        exchange.id,
        exchange.caller,
        "" if ended else ", cut off",
        extra={"fields": fields},
    )
