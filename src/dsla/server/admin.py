"""`/admin`: the engine's state, events and plan, the level set by hand, draining, cancelling. `Gate` says who may ask."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from dsla.convert.adapter import Adapter
from dsla.engine import AsyncEngine
from dsla.errors import EngineError
from dsla.server.errors import ApiError, unavailable
from dsla.server.plan import plan_of
from dsla.server.protocol import DrainRequest, LevelRequest
from dsla.server.responses import AdminEvents, AdminPlan, AdminState, Cancelled

EventsAfter = Annotated[
    int, Query(ge=0, description="leave out so many events, the oldest of all: event_count of an earlier answer")
]
Waiting = Annotated[
    int, Query(ge=0, le=4096, description="waiting requests that are listed, at most; `waiting` counts all of them")
]
_WAITING = 20


def admin_routes(engine: AsyncEngine, model_name: str, adapter: Adapter | None) -> APIRouter:
    """The routes.

    Args:
        engine: the engine.
        model_name: name of its model.
        adapter: where its mixers come from, if that is known.
    """
    router = APIRouter(prefix="/admin")
    its_plan = plan_of(engine.engine.decoder, model_name, adapter)

    @router.get("/state")
    async def state(events_after: EventsAfter = 0, waiting: Waiting = _WAITING) -> AdminState:
        return AdminState(model=model_name, stats=engine.stats(events_after, waiting))

    @router.get("/events")
    async def events(events_after: EventsAfter = 0) -> AdminEvents:
        stats = engine.stats(events_after, most_waiting=0)
        return AdminEvents(now=stats["now"], event_count=stats["event_count"], events=stats["events"])

    @router.get("/plan")
    async def plan() -> AdminPlan:
        return its_plan

    @router.post("/level")
    def level(body: LevelRequest) -> AdminState:
        try:
            engine.set_level(body.level)
        except EngineError as error:
            if not engine.healthy:
                raise unavailable() from error
            raise ApiError(400, str(error), param="level", code="invalid_value") from error
        return AdminState(model=model_name, stats=engine.stats(most_waiting=_WAITING))

    @router.post("/drain")
    async def drain(body: DrainRequest | None = None) -> AdminState:
        engine.drain(body is None or body.draining)
        return AdminState(model=model_name, stats=engine.stats(most_waiting=_WAITING))

    @router.post("/cancel/{request_id}")
    def cancel(request_id: str) -> Cancelled:
        """Ends what a request with this `X-Request-Id` has open, or the one answer that has this name in the state."""
        names = [name for name in engine.engine.open_ids if request_id in (name, name.partition("~")[0])]
        try:
            ended = engine.cancel_all(names) if names else []
        except EngineError as error:
            raise unavailable() from error
        if not ended:
            raise ApiError(404, "No request with this id is open", param="request_id", code="request_not_found")
        return Cancelled(cancelled=ended)

    return router
