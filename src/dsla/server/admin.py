"""`/admin`: the engine's state, and the level set by hand. Answers to this machine only."""

from __future__ import annotations

import ipaddress

from fastapi import APIRouter, Depends, Request

from dsla.engine import AsyncEngine
from dsla.errors import EngineError
from dsla.server.errors import ApiError, unavailable
from dsla.server.protocol import LevelRequest
from dsla.server.responses import AdminState


def admin_routes(engine: AsyncEngine, model_name: str) -> APIRouter:
    """The routes.

    Args:
        engine: the engine.
        model_name: name of its model.
    """
    router = APIRouter(prefix="/admin", dependencies=[Depends(_from_this_machine)])

    @router.get("/state")
    async def state() -> AdminState:
        return AdminState(model=model_name, stats=engine.stats())

    @router.post("/level")
    def level(body: LevelRequest) -> AdminState:
        try:
            engine.set_level(body.level)
        except EngineError as error:
            if not engine.healthy:
                raise unavailable() from error
            raise ApiError(400, str(error), param="level", code="invalid_value") from error
        return AdminState(model=model_name, stats=engine.stats())

    return router


async def _from_this_machine(request: Request) -> None:
    host = request.client.host if request.client else ""
    try:
        allowed = ipaddress.ip_address(host).is_loopback
    except ValueError:
        allowed = False
    if not allowed:
        raise ApiError(403, "The admin API answers to the server's own machine only", code="forbidden")
