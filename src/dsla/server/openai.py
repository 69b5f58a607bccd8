"""`POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import count, product
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dsla.engine import AsyncEngine, RequestStream, SamplingParams, TokenConstraint, derive_seed
from dsla.errors import BusyError, DrainingError, EngineError
from dsla.server.chunks import AnswerWriter
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import ApiError, busy, check_model, draining, timed_out, unavailable
from dsla.server.exchange import Exchange
from dsla.server.generation import Answers, close_all, unless_disconnected
from dsla.server.logprobs import LogprobWriter
from dsla.server.prompts import PromptReader
from dsla.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from dsla.server.responses import ChatCompletion, Completion
from dsla.server.settings import ServerSettings
from dsla.server.sse import EventStream
from dsla.server.structured import JsonSchemas

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, its parts as they come, one JSON object an event, and then `[DONE]`",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def openai_routes(
    engine: AsyncEngine,
    prompts: PromptReader,
    schemas: JsonSchemas,
    table: TokenBytes,
    names: TokenBytes,
    model_name: str,
    settings: ServerSettings,
) -> APIRouter:
    """The routes.

    Args:
        engine: runs the requests.
        prompts: reads prompts.
        schemas: compiles the schemas that answers have to follow.
        table: bytes of the model's tokens.
        names: the same, with those of special tokens, for reports of probabilities.
        model_name: name that requests must ask for.
        settings: limits.
    """
    router = APIRouter()
    serials = count(1)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model, model_name)
        check_answers(body.n or 1)

        async def read() -> list[list[int]]:
            return [await prompts.chat(body.messages, body.token_limit)]

        return await respond(body, read, request, chat=True)

    @router.post("/v1/completions", response_model=Completion, responses=_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model, model_name)
        check_answers(len(body.prompt) * (body.n or 1))

        async def read() -> list[list[int]]:
            return [await prompts.completion(prompt, body.token_limit) for prompt in body.prompt]

        return await respond(body, read, request, chat=False)

    def check_answers(answers: int) -> None:
        if answers > settings.max_answers:
            message = f"Invalid value for 'n': at most {settings.max_answers} answers in one request, found {answers}"
            raise ApiError(400, message, param="n", code="invalid_value")
        if answers > (room := engine.engine.config.max_waiting):
            message = f"Invalid value for 'n': {answers} answers never fit into this server's queue, which holds {room}"
            raise ApiError(400, message, param="n", code="invalid_value")

    async def respond(
        body: GenerationRequest, read: Callable[[], Awaitable[list[list[int]]]], request: Request, chat: bool
    ) -> Response:
        n, exchange = body.n or 1, Exchange.of(request.scope)
        deadline = None if settings.request_seconds is None else exchange.began + settings.request_seconds

        async def prepare() -> tuple[list[list[int]], Callable[[], TokenConstraint] | None]:
            try:
                async with asyncio.timeout_at(deadline):
                    return await read(), await schemas.constraint(body.answer_schema)
            except TimeoutError:
                raise timed_out() from None

        tokens, constraint = await unless_disconnected(request, prepare())
        params = [sampling_params(body, answer, constraint) for answer in range(n)]
        exchange.prompt_tokens = sum(len(prompt) for prompt in tokens)
        answers = Answers(await generate(body, tokens, params, exchange.id, deadline), table, body.stop, exchange)
        writer = AnswerWriter(
            model_name, chat, len(tokens), n, None if body.top_count is None else LogprobWriter(names)
        )
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(writer.chunks(answers, include_usage, body.dsla.stream_levels), answers)
        async with aclosing(answers):
            answer = await unless_disconnected(request, writer.answer(answers))
        return JSONResponse(answer.model_dump(exclude_none=True))

    async def generate(
        body: GenerationRequest,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        request_id: str,
        deadline: float | None,
    ) -> list[RequestStream]:
        """The answers to all prompts, not begun yet; a prompt is computed for the first of its own. Refuses all or none."""
        levels, outputs, leader = body.dsla, list[RequestStream](), ""
        try:
            async with AsyncExitStack() as refused:
                refused.push_async_callback(close_all, outputs)
                for prompt, (answer, each) in product(prompts, enumerate(params)):
                    # Clients may give two requests one id, but no id has a tilde.
                    name = f"{request_id}~{next(serials)}"
                    leader = leader if answer else name
                    outputs.append(
                        engine.generate(
                            prompt,
                            each,
                            request_id=name,
                            quality=levels.quality,
                            max_level=levels.max_level,
                            min_level=levels.min_level,
                            sibling_of=leader if answer else None,
                            deadline=deadline,
                        )
                    )
                refused.pop_all()
            return outputs
        except BusyError as error:
            raise busy() from error
        except DrainingError as error:
            raise draining() from error
        except EngineError as error:
            if not engine.healthy:
                raise unavailable() from error
            raise ApiError(400, str(error), code="request_too_large") from error

    return router


def sampling_params(
    body: GenerationRequest, answer: int, constraint: Callable[[], TokenConstraint] | None
) -> SamplingParams:
    """What a request asks of sampling, for one of the `n` answers to a prompt; a null means the API's default."""
    return SamplingParams(
        max_tokens=body.token_limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=None if body.seed is None else derive_seed(body.seed, answer),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=body.logit_bias,
        logprobs=body.top_count,
        constraint=constraint,
    )
