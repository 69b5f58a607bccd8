"""What machines ask a server: is it alive, does it take requests, how does it do."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from dsla.engine import AsyncEngine
from dsla.server.errors import not_ready, unavailable
from dsla.server.metrics import Metrics
from dsla.server.responses import Health

_METRICS = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}


def operations_routes(engine: AsyncEngine, metrics: Metrics) -> APIRouter:
    """The routes.

    Args:
        engine: the engine.
        metrics: what is counted.
    """
    router = APIRouter()

    @router.get("/health")
    async def health() -> Health:
        if not engine.healthy:
            raise unavailable()
        return Health()

    @router.get("/ready")
    async def ready() -> Health:
        if engine.state != "ready":
            raise not_ready(engine.state)
        return Health()

    @router.get("/metrics", response_class=Response, responses={200: {"content": _METRICS}})
    def read_metrics(request: Request) -> Response:
        content, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    return router
