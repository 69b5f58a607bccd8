"""The HTTP application: OpenAI's endpoints over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from dsla import __version__
from dsla.convert.adapter import Adapter
from dsla.engine import AsyncEngine
from dsla.server.access import Access
from dsla.server.admin import admin_routes
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import check_model, install_handlers
from dsla.server.gate import Gate, opened_by
from dsla.server.keys import Keys
from dsla.server.limits import Limits
from dsla.server.metrics import Metrics
from dsla.server.openai import openai_routes
from dsla.server.operations import operations_routes
from dsla.server.pages import page_routes
from dsla.server.prompts import PromptReader
from dsla.server.responses import ErrorBody, ModelCard, ModelList
from dsla.server.settings import ServerSettings
from dsla.server.structured import JsonSchemas
from dsla.server.tokens import token_routes

_CLIENT_CLOSED_REQUEST = 499
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong",
        401: "A key is needed, or this one is wrong",
        403: "Not allowed from here, or with this key",
        404: "There is no such thing",
        405: "The method is not one of this URL",
        408: "The body did not come in time",
        413: "The body is too large",
        429: "Too many requests wait, or this caller has too many open",
        500: "The server failed",
        503: "The engine has stopped, or takes nothing new",
        504: "It took too long",
    }.items()
}


class Application(FastAPI):
    """An application whose schema says what is answered, and with which keys.

    Wrong requests get a 400, nothing ever FastAPI's own 422.

    Args:
        keys: the keys.
        settings: as `FastAPI` has them.
    """

    def __init__(self, keys: Keys, **settings: Any) -> None:
        super().__init__(**settings)
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema."""
        schema, keys = super().openapi(), self._keys
        for path, operations in schema["paths"].items():
            kinds = opened_by(path, keys)
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if kinds:
                    operation["security"] = [{kind: []} for kind in kinds]
        components = schema["components"]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        there = {"api": keys.has_api, "admin": keys.has_admin}
        schemes = {kind: {"type": "http", "scheme": "bearer"} for kind, has in there.items() if has}
        if schemes:
            components["securitySchemes"] = schemes
        return schema


def build_app(
    engine: AsyncEngine,
    tokenizer: Any,
    model_name: str,
    settings: ServerSettings | None = None,
    adapter: Adapter | None = None,
) -> FastAPI:
    """The application of one model.

    Args:
        engine: runs the requests; closed when the application shuts down.
        tokenizer: Hugging Face fast tokenizer of the model.
        model_name: name that requests ask for.
        settings: keys, limits and other origins. Default: no keys.
        adapter: where the engine's mixers come from, for `/admin/plan`.

    Raises:
        ModelError: if the tokenizer is not supported.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    settings = settings or ServerSettings()
    keys = Keys(settings.api_keys, settings.admin_key)
    metrics = Metrics(engine, model_name)
    app = Application(
        keys,
        title="dsla",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=True,  # a page of any site can send a body without a type, unasked
        lifespan=lifespan,
        responses=_ERRORS,
        middleware=_middleware(settings, keys, metrics),
    )
    app.state.engine = engine
    install_handlers(app)
    decoder = engine.engine.decoder
    card = ModelCard(
        id=model_name, created=int(time.time()), max_model_len=decoder.max_tokens, max_level=len(decoder.order)
    )

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        check_model(model, model_name)
        return card

    table, names = TokenBytes.of(tokenizer), TokenBytes.of(tokenizer, keep_special=True)
    prompts = PromptReader(tokenizer, decoder.max_tokens, names)
    schemas = JsonSchemas(tokenizer, table, decoder.vocab_size, decoder.eos_token_ids)
    app.include_router(openai_routes(engine, prompts, schemas, table, names, model_name, settings))
    app.include_router(token_routes(prompts, model_name, decoder.max_tokens, decoder.vocab_size))
    app.include_router(operations_routes(engine, metrics))
    app.include_router(admin_routes(engine, model_name, adapter))
    app.include_router(page_routes())
    return app


def _middleware(settings: ServerSettings, keys: Keys, metrics: Metrics) -> list[Middleware]:
    """What is around the routes, outermost first. Preflight requests of other origins have no key: they end before the gate."""
    layers = [Middleware(Access, count=metrics.count)]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    return [*layers, Middleware(Gate, keys=keys, any_host=settings.any_host), Middleware(Limits, settings=settings)]
