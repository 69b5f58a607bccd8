"""From request bodies to token ids: tokenizing, limits of the context. `chat.py` has the chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dsla.errors import ModelError, RequestError
from dsla.server.chat import render_chat
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import ApiError
from dsla.server.protocol import Message
from dsla.server.text_bound import TextBound

T = TypeVar("T")

_THREADS = 2
"""Texts that are tokenized at once, at most: a token takes some hundred bytes meanwhile."""


class PromptReader:
    """Turns messages, texts and token ids into prompts that fit the model.

    Args:
        tokenizer: Hugging Face fast tokenizer.
        context_length: tokens a prompt and its answer may have together.
        names: bytes of its tokens, special ones too.
    """

    def __init__(self, tokenizer: Any, context_length: int, names: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._bound = TextBound(tokenizer, names)
        # Not the event loop's own threads: whoever closes the engine needs one of those.
        self._threads = ThreadPoolExecutor(_THREADS, "dsla-prompts")

    async def chat(self, messages: Sequence[Message], max_tokens: int | None) -> list[int]:
        """Token ids of a conversation, ready for the answer.

        Raises:
            ApiError: no chat template, messages it refuses, or too many tokens.
        """
        return self._fitting(await self.chat_tokens(messages), max_tokens, "messages")

    async def completion(self, prompt: str | list[int], max_tokens: int | None) -> list[int]:
        """Token ids of a prompt, given as text or as token ids.

        Raises:
            ApiError: an empty prompt, or too many tokens.
        """
        tokens = await self.tokens(prompt) if isinstance(prompt, str) else prompt
        return self._fitting(tokens, max_tokens, "prompt")

    async def chat_tokens(
        self, messages: Sequence[Message], special: bool = False, generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, whatever room they leave for an answer.

        Args:
            messages: the conversation.
            special: add the tokenizer's special tokens to those of the chat template.
            generation_prompt: end with the template's beginning of an answer.

        Raises:
            ApiError: no chat template, messages it refuses, or so many that they cannot fit.
        """
        if len(messages) > self._context_length:  # a token each, at least; templates take long over so many
            raise self._too_long("messages", f"but there are {len(messages)} messages. Leave out some")
        return await self._aside(lambda: self._encode(self._render(messages, generation_prompt), special, "messages"))

    async def tokens(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens or without.

        Raises:
            ApiError: it is so long that it cannot fit.
        """
        return await self._aside(lambda: self._encode(text, special, "prompt"))

    async def text(self, tokens: Sequence[int]) -> str:
        """Text of token ids, with that of special tokens."""
        text: str = await self._aside(
            lambda: self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        return text

    def names(self, tokens: Sequence[int]) -> list[str]:
        """What the vocabulary calls tokens."""
        names: list[str] = self._tokenizer.convert_ids_to_tokens(tokens)
        return names

    async def _aside(self, work: Callable[[], T]) -> T:
        """What `work` returns. A long text takes seconds: other requests go on."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _encode(self, text: str, special: bool, param: str) -> list[int]:
        if self._bound.exceeded(text, self._context_length):
            raise self._too_long(param, f"and '{param}' is too long to have so few, whatever they are. Shorten it")
        tokens: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return tokens

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in messages
        ]
        try:
            return render_chat(self._tokenizer, turns, generation_prompt)
        except ModelError as error:
            message = "This model has no chat template: use /v1/completions"
            raise ApiError(400, message, param="messages", code="no_chat_template") from error
        except RequestError as error:
            # What the template says of the messages may hold text of them.
            message = "The model's chat template refuses these messages: check the roles and their order"
            raise ApiError(400, message, param="messages", code="invalid_value") from error

    def _fitting(self, tokens: list[int], max_tokens: int | None, param: str) -> list[int]:
        if not tokens:
            raise ApiError(400, f"Invalid value for '{param}': it has no tokens", param=param, code="invalid_value")
        answer = max_tokens or 1
        if len(tokens) + answer > self._context_length:
            raise self._too_long(
                param,
                f"but {len(tokens) + answer} were requested: {len(tokens)} in '{param}', {answer} to be generated. "
                "Shorten one of them",
            )
        return tokens

    def _too_long(self, param: str, why: str) -> ApiError:
        message = f"This model's maximum context length is {self._context_length} tokens, {why}"
        return ApiError(400, message, param=param, code="context_length_exceeded")
