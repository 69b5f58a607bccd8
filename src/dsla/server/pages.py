"""The dashboard: one page at `/` and its files. They hold no data and need no key: the page asks for both."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from dsla.server.errors import ApiError

FOLDER = Path(__file__).parent / "dashboard"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Endings of the files that are served, and what they are."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""Nothing but this server's own files runs in the page, and no text becomes HTML there."""

_INDEX = "index.html"
_FOUND = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES}

PAGES = frozenset({"/", *(f"/dashboard/{name}" for name in _FOUND if name != _INDEX)})
"""Paths that are answered."""


def page_routes() -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    files = {name: (path.read_bytes(), TYPES[path.suffix]) for name, path in _FOUND.items()}

    @router.get("/")
    async def index(request: Request) -> Response:
        return answer(_INDEX, request)

    @router.get("/dashboard/{name:path}")
    async def file(name: str, request: Request) -> Response:
        if f"/dashboard/{name}" not in PAGES:
            raise ApiError(404, "The dashboard has no such file", code="unknown_url")
        return answer(name, request)

    def answer(name: str, request: Request) -> Response:
        """The file, or 304 where the browser has it as it is."""
        content, media_type = files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return router
