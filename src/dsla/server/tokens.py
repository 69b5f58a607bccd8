"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter

from dsla.server.errors import ApiError, check_model
from dsla.server.prompts import PromptReader
from dsla.server.protocol import DetokenizeRequest, TokenizeRequest
from dsla.server.responses import Detokenized, Tokenized


def token_routes(prompts: PromptReader, model_name: str, max_model_len: int, vocab_size: int) -> APIRouter:
    """The routes.

    Args:
        prompts: reads prompts.
        model_name: name of the model; requests need not say it.
        max_model_len: tokens of its context.
        vocab_size: token ids it knows.
    """
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        check_model(body.model or model_name, model_name)
        if body.messages is not None:
            special = bool(body.add_special_tokens)
            tokens = await prompts.chat_tokens(body.messages, special, body.add_generation_prompt)
        else:
            tokens = await prompts.tokens(body.prompt or "", body.add_special_tokens is not False)
        names = prompts.names(tokens) if body.return_token_strs else None
        return Tokenized(count=len(tokens), max_model_len=max_model_len, tokens=tokens, token_strs=names)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        check_model(body.model or model_name, model_name)
        unknown = next((token for token in body.tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            message = f"Invalid value for 'tokens': it holds {unknown}, the model knows 0 to {vocab_size - 1}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return Detokenized(prompt=await prompts.text(body.tokens))

    return router
