"""The HTTP application: OpenAI's endpoints over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from dsla import __version__
from dsla.engine import AsyncEngine
from dsla.server.admin import admin_routes
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import check_model, install_handlers, unavailable
from dsla.server.openai import openai_routes
from dsla.server.prompts import PromptReader
from dsla.server.responses import ErrorBody, Health, ModelCard, ModelList

_CLIENT_CLOSED_REQUEST = 499
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong",
        403: "Not allowed from here",
        404: "There is no such thing",
        500: "The server failed",
        503: "The engine has stopped",
    }.items()
}


def build_app(engine: AsyncEngine, tokenizer: Any, model_name: str) -> FastAPI:
    """The application of one model.

    Args:
        engine: runs the requests; closed when the application shuts down.
        tokenizer: Hugging Face fast tokenizer of the model.
        model_name: name that requests ask for.

    Raises:
        ModelError: if the tokenizer is not supported.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="dsla", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=_ERRORS
    )
    app.state.engine = engine
    install_handlers(app)
    decoder = engine.engine.decoder
    card = ModelCard(
        id=model_name, created=int(time.time()), max_model_len=decoder.max_tokens, max_level=len(decoder.order)
    )
    prompts = PromptReader(tokenizer, decoder.max_tokens)

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    @app.get("/health")
    async def health() -> Health:
        if not engine.healthy:
            raise unavailable()
        return Health()

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        check_model(model, model_name)
        return card

    table, names = TokenBytes.of(tokenizer), TokenBytes.of(tokenizer, keep_special=True)
    app.include_router(openai_routes(engine, prompts, table, names, model_name))
    app.include_router(admin_routes(engine, model_name))
    return app
