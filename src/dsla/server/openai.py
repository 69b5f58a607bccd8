"""`POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dsla.engine import AsyncEngine, SamplingParams, StepOutput
from dsla.errors import EngineError
from dsla.server.chunks import AnswerWriter
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import ApiError, check_model, unavailable
from dsla.server.generation import merged, text_pieces, unless_disconnected
from dsla.server.prompts import PromptReader
from dsla.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from dsla.server.responses import ChatCompletion, Completion
from dsla.server.sse import EventStream


def openai_routes(engine: AsyncEngine, prompts: PromptReader, table: TokenBytes, model_name: str) -> APIRouter:
    """The routes.

    Args:
        engine: runs the requests.
        prompts: reads prompts.
        table: bytes of the model's tokens.
        model_name: name that requests must ask for.
    """
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model, model_name)
        tokens = await prompts.chat(body.messages, body.token_limit)
        return await respond(body, [tokens], request, chat=True)

    @router.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model, model_name)
        tokens = [await prompts.completion(prompt, body.token_limit) for prompt in body.prompt]
        return await respond(body, tokens, request, chat=False)

    async def respond(body: GenerationRequest, tokens: Sequence[list[int]], request: Request, chat: bool) -> Response:
        params = sampling_params(body)
        # The engine gets nothing before the first output is asked for: a refused prompt leaves nothing behind.
        streams = [text_pieces(generate(body, prompt, params), table, body.stop) for prompt in tokens]
        pieces = merged(streams)
        writer = AnswerWriter(model_name, chat, len(tokens))
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(writer.chunks(pieces, include_usage), pieces)
        answer = await unless_disconnected(request, writer.answer(pieces))
        return JSONResponse(answer.model_dump(exclude_none=True))

    def generate(
        body: GenerationRequest, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[StepOutput, None]:
        levels = body.dsla
        try:
            return engine.generate(
                prompt, params, quality=levels.quality, max_level=levels.max_level, min_level=levels.min_level
            )
        except EngineError as error:
            if not engine.healthy:
                raise unavailable() from error
            raise ApiError(400, str(error), code="request_too_large") from error

    return router


def sampling_params(body: GenerationRequest) -> SamplingParams:
    """What a request asks of sampling; a null means the API's default."""
    return SamplingParams(
        max_tokens=body.token_limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        ignore_eos=body.ignore_eos,
    )
