"""Where the answers of `dsla chat` come from: an engine in this process, or a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dsla.cli.conversation import Turn
from dsla.client import (
    check_key,
    error_message,
    http_errors,
    key_headers,
    model_card,
    no_server,
    server_root,
    stream_events,
)
from dsla.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

    from dsla.server.build import Service

_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, the same for all answers of a chat.

    Attributes:
        max_tokens: tokens of an answer, at most; None = as many as the engine grants.
        temperature: 0 = always the most likely token.
        seed: makes sampling repeatable, or None.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Report:
    """What is known of an answer at its end; None where whoever answers does not say.

    Attributes:
        finish_reason: `stop` or `length`.
        prompt_tokens: tokens of all turns.
        cached_tokens: tokens of them that were computed before.
        completion_tokens: tokens of the answer.
        levels: level history `[[from_token, level], ...]`.
    """

    finish_reason: str | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    levels: Sequence[Sequence[int]] = field(default_factory=list)


Answer = AsyncGenerator[str | Report, None]
"""Pieces of text, then a report. Closing it earlier ends the computation."""


class Source(Protocol):
    """Whoever answers.

    Attributes:
        name: of the model.
        max_level: its highest level; None = it has none.
        context: tokens of turns and answer together; None = unknown.
    """

    name: str
    max_level: int | None
    context: int | None

    def answer(self, messages: Sequence[Turn], levels: Mapping[str, Any]) -> Answer:
        """The answer to a conversation, within bounds of its levels.

        Raises:
            RequestError: the conversation is too long or the chat template refuses it, or a bound is wrong.
            ModelError: the model has no chat template.
            EngineError: it fails, or there is no room for it.
        """

    async def close(self) -> None:
        """Frees what it holds."""


class Local:
    """An engine in this process.

    Args:
        service: what `build_engine` made.
        sampling: how tokens are chosen.
    """

    def __init__(self, service: Service, sampling: Sampling) -> None:
        from dsla.engine import AsyncEngine, SamplingParams
        from dsla.server.detokenize import TokenBytes

        decoder = service.engine.decoder
        self.name = service.model_name
        self.max_level: int | None = len(decoder.order)
        self.context: int | None = decoder.max_tokens
        self._tokenizer, self._bytes = service.tokenizer, TokenBytes.of(service.tokenizer)
        self._params = SamplingParams(sampling.max_tokens, sampling.temperature, seed=sampling.seed)
        self._engine = AsyncEngine(service.engine)

    async def answer(self, messages: Sequence[Turn], levels: Mapping[str, Any]) -> Answer:
        from dsla.server.chat import chat_tokens
        from dsla.server.detokenize import Detokenizer

        detokenizer = Detokenizer(self._bytes)
        outputs = self._engine.generate(chat_tokens(self._tokenizer, messages), self._params, **levels)
        async with aclosing(outputs):
            async for output in outputs:
                if output.finish_reason in ("error", "abort"):
                    raise EngineError(output.error or "the engine has stopped")
                yield detokenizer.add(output.tokens) + (detokenizer.finish() if output.finish_reason else "")
                if output.finish_reason:
                    yield Report(
                        output.finish_reason,
                        output.prompt_tokens,
                        output.cached_tokens,
                        output.completion_tokens,
                        output.levels,
                    )

    async def close(self) -> None:
        self._engine.close()


class Remote:
    """A server with OpenAI's API; made by `connect`."""

    def __init__(self, root: str, card: Mapping[str, Any], sampling: Sampling, client: AsyncClient) -> None:
        self.name: str = card["id"]
        self.max_level: int | None = card.get("max_level")
        self.context: int | None = card.get("max_model_len")
        self._root, self._client = root, client
        asked = {"max_tokens": sampling.max_tokens, "seed": sampling.seed, "temperature": sampling.temperature}
        fixed = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        self._body = fixed | {name: value for name, value in asked.items() if value is not None}

    @classmethod
    async def connect(cls, url: str, model: str | None, api_key: str | None, sampling: Sampling) -> Remote:
        """Asks a server for its model.

        Args:
            url: where it is, with or without `/v1`.
            model: name of the model; None = the first it lists.
            api_key: key, where it wants one.
            sampling: how tokens are chosen.

        Raises:
            ConfigError: nothing answers there, it is no such server, wants a key, or does not have the model.
        """
        import httpx

        root = server_root(url)
        # A long prompt may take minutes before the first token.
        client = httpx.AsyncClient(headers=key_headers(api_key), timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS))
        try:
            return cls(root, model_card(await client.get(f"{root}/v1/models"), root, model), sampling, client)
        except http_errors() as error:
            await client.aclose()
            raise no_server(root, error) from None

    async def answer(self, messages: Sequence[Turn], levels: Mapping[str, Any]) -> Answer:
        body = self._body | {"messages": list(messages)} | ({"dsla": dict(levels)} if levels else {})
        try:
            async with self._client.stream("POST", f"{self._root}/v1/chat/completions", json=body) as response:
                await self._check(response)
                async for part in _parts(response):
                    yield part
        except http_errors() as error:
            raise no_server(self._root, error) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _check(self, response: Response) -> None:
        if response.status_code == 200:
            return
        await response.aread()
        check_key(response, self._root)
        raise EngineError(f"the server answers {response.status_code}: {error_message(response)}")


async def _parts(response: Response) -> Answer:
    reason: str | None = None
    usage: dict[str, Any] = {}
    levels: list[list[int]] = []
    async for event in stream_events(response):
        if "error" in event:
            raise EngineError(f"the server broke off: {event['error'].get('message', event['error'])}")
        for choice in event.get("choices") or ():
            yield choice.get("delta", {}).get("content") or ""
            reason = choice.get("finish_reason") or reason
        usage = event.get("usage") or usage
        levels = (event.get("dsla") or {}).get("levels") or levels
    if reason is None:
        raise ConfigError("the server's answer ended early: see its log")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    yield Report(reason, usage.get("prompt_tokens"), cached, usage.get("completion_tokens"), levels)
