"""Who may ask what: keys for the API, or this machine's own names; a key of its own, or this machine, for `/admin`."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsla.server.errors import ApiError
from dsla.server.exchange import ANYONE, Exchange
from dsla.server.keys import ADMIN, Keys
from dsla.server.pages import PAGES

OPEN = frozenset({"/health", "/ready"}) | PAGES
"""Paths that need no key: probes have none, and neither has a browser before the dashboard asked for it."""

_ADMIN_TOO = frozenset({"/metrics"})
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")

# A page of another site can give its own name the address 127.0.0.1: its browser then takes this server for that site.
_FOREIGN_NAME = (
    "Without keys this server answers under names of its own machine only, as localhost or 127.0.0.1; "
    "start it with an API key, or with --no-auth to serve everybody"
)


class Gate:
    """ASGI middleware that lets requests through, or answers 401 or 403.

    Args:
        app: what is behind the gate.
        keys: the keys.
        any_host: whether those who need no key are answered under any host name.
    """

    def __init__(self, app: ASGIApp, keys: Keys, any_host: bool) -> None:
        self._app, self._keys, self._any_host = app, keys, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, keys, for_admin = Headers(scope=scope), self._keys, is_admin(scope)
        caller = keys.caller(headers.get("authorization"))
        if not (keys.has_admin if for_admin else keys.has_api):
            if for_admin and keys.has_api:
                raise ApiError(403, "The admin API is off: start the server with an admin key", code="forbidden")
            if for_admin:
                _check_local(scope, headers)
            elif not self._any_host and not _names_loopback(headers):
                raise ApiError(403, _FOREIGN_NAME, code="forbidden")
            return
        Exchange.of(scope).caller = caller or ANYONE
        if caller is None:
            message = "No API key was given" if "authorization" not in headers else "Incorrect API key"
            raise ApiError(401, f"{message}: send the header 'Authorization: Bearer KEY'", code="invalid_api_key")
        if (caller == ADMIN) != for_admin and not (caller == ADMIN and scope["path"] in _ADMIN_TOO):
            where = "the admin API needs the admin key" if for_admin else "the admin key opens /admin and /metrics only"
            raise ApiError(403, f"This key is not for here: {where}", code="forbidden")


def opened_by(path: str, keys: Keys) -> tuple[str, ...]:
    """Kinds of keys that open a path, `api` and `admin`; none where no key is needed, or none helps."""
    if path in OPEN:
        return ()
    if _in_admin(path):
        return ("admin",) if keys.has_admin else ()
    if not keys.has_api:
        return ()
    return ("api", "admin") if keys.has_admin and path in _ADMIN_TOO else ("api",)


def is_admin(scope: Scope) -> bool:
    """Whether a request is for `/admin`."""
    return _in_admin(scope["path"])


def _in_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def _check_local(scope: Scope, headers: Headers) -> None:
    """Without keys `/admin` is for programs and people on this machine: not for those a proxy on it speaks for, nor for
    pages of other sites in a browser on it, under whatever name these reach it.
    """
    origin = headers.get("origin")
    local = _is_loopback(scope["client"][0] if scope.get("client") else "") and _names_loopback(headers)
    if not local or any(name in headers for name in _FORWARDED):
        raise ApiError(403, "The admin API answers to the server's own machine only", code="forbidden")
    if origin is not None and _split(origin).netloc != headers.get("host"):
        raise ApiError(403, "The admin API does not answer to pages of other sites", code="forbidden")


def _names_loopback(headers: Headers) -> bool:
    """Whether the host that a request names can only be this machine."""
    return _is_loopback(_split(f"//{headers.get('host', '')}").hostname or "")


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
