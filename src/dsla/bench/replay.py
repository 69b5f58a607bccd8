"""Sends requests to a server with OpenAI's API at the times a trace says, whether it keeps up or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsla.bench.goodput import CANCELLED, DONE, FAILED, REJECTED, Outcome
from dsla.bench.prompts import FIRST_TOKEN, prompt_tokens
from dsla.bench.trace import TraceRequest
from dsla.client import error_message, http_errors, key_headers, model_card, no_server, server_root, stream_events
from dsla.errors import ConfigError

if TYPE_CHECKING:
    from httpx import AsyncClient

_REFUSALS = (429, 503)
_WRONG_FIELD = (400, 422)
_PROBE_TOKENS = 4
_EXTRAS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Fields beside OpenAI's oldest ones, the best first: all that a server takes are sent."""


@dataclass(frozen=True)
class Server:
    """A server and how it is asked.

    Attributes:
        url: of its API, without `/v1`.
        model: name of the model.
        max_tokens: tokens of prompt and output it allows, where it says so.
        extras: fields of every request.
        headers: headers of every request.
    """

    url: str
    model: str
    max_tokens: int | None
    extras: dict[str, Any]
    headers: dict[str, str]


async def find_server(
    url: str, vocabulary: int, model: str | None = None, api_key: str | None = None, timeout: float = 60.0
) -> Server:
    """Asks a server for its model, and with a short request which fields it takes.

    Args:
        url: where it is, with or without `/v1`.
        vocabulary: token ids of prompts are below it.
        model: name of the model. Default: the first it lists.
        api_key: key, where it wants one.
        timeout: seconds to wait for an answer.

    Raises:
        ConfigError: nothing answers there, it is no such server, it wants a key, or it refuses the request.
    """
    base, headers = server_root(url), key_headers(api_key)
    async with _client(headers) as client:
        try:
            async with asyncio.timeout(timeout):
                listed = await client.get(f"{base}/v1/models")
                card = model_card(listed, base, model)
                name, limit = card["id"], card.get("max_model_len")
                server = Server(base, name, limit if type(limit) is int else None, {}, headers)
                return await _with_extras(client, server, vocabulary)
        except TimeoutError:
            raise ConfigError(f"the server at {base} did not answer within {timeout:g} s") from None
        except http_errors() as error:
            raise no_server(base, error) from None


async def replay(
    server: Server,
    requests: Sequence[TraceRequest],
    seed: Sequence[int],
    vocabulary: int,
    timeout: float,
    outcomes: list[Outcome],
    on_end: Callable[[int], None],
) -> None:
    """Sends requests when they are due and reads the answers as they come.

    Args:
        server: whom to ask.
        requests: at least one, in order of arrival.
        seed: of the prompts.
        vocabulary: token ids of prompts are below it.
        timeout: seconds an answer may take before it counts as failed.
        outcomes: one is added as each request ends; where this is cancelled, also for those that have begun.
        on_end: called with the number of open requests whenever one ended.
    """
    begun = time.perf_counter()
    open_requests = 0

    async def one(client: AsyncClient, index: int, request: TraceRequest) -> None:
        nonlocal open_requests
        await asyncio.sleep(begun + request.at - time.perf_counter())
        open_requests += 1
        prompt = prompt_tokens(request, index, seed, vocabulary)
        answer = _Answer(begun, request, time.perf_counter() - begun)
        try:
            async with asyncio.timeout(timeout):
                await answer.read(client, server, prompt)
        except TimeoutError:
            answer.end(FAILED, f"no whole answer within {timeout:g} s")
        except http_errors() as error:
            answer.end(FAILED, f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            answer.end(CANCELLED)
            raise
        finally:
            open_requests -= 1
            outcomes.append(answer.outcome())
        on_end(open_requests)

    async with _client(server.headers) as client, asyncio.TaskGroup() as group:
        for index, request in enumerate(requests):
            group.create_task(one(client, index, request))


class _Answer:
    """Reads one answer and notes when its pieces came."""

    def __init__(self, begun: float, request: TraceRequest, sent: float) -> None:
        self._begun, self._request, self._sent = begun, request, sent
        self._status, self._error = FAILED, "the answer ended early"
        self._arrivals: list[float] = []
        self._usage: dict[str, Any] = {}
        self._level: int | None = None
        self._ended = False

    def end(self, status: str, error: str = "") -> None:
        self._status, self._error = status, error

    async def read(self, client: AsyncClient, server: Server, prompt: list[int]) -> None:
        body = _body(server, prompt, self._request.output_tokens)
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                refused = response.status_code in _REFUSALS
                self.end(REJECTED if refused else FAILED, f"{response.status_code}: {error_message(response)}")
                return
            async for event in stream_events(response):
                if "error" in event:
                    self.end(FAILED, str(event["error"])[:200])
                    return
                self._take(event)
        if self._arrivals and self._ended:
            self.end(DONE)

    def _take(self, event: dict[str, Any]) -> None:
        choices = event.get("choices") or []
        if choices:
            self._arrivals.append(time.perf_counter() - self._begun)
            self._ended = self._ended or choices[0].get("finish_reason") is not None
        self._usage = event.get("usage") or self._usage
        levels = (event.get("dsla") or {}).get("levels")
        self._level = levels[-1][1] if levels else self._level

    def outcome(self) -> Outcome:
        details = self._usage.get("prompt_tokens_details") or {}
        return Outcome(
            status=self._status,
            prompt_tokens=self._request.prompt_tokens,
            wanted_tokens=self._request.output_tokens,
            due=self._request.at,
            sent=self._sent,
            ended=time.perf_counter() - self._begun,
            arrivals=tuple(self._arrivals),
            output_tokens=self._usage.get("completion_tokens", len(self._arrivals)),
            cached_tokens=details.get("cached_tokens"),
            level=self._level,
            error=self._error or None,
        )


async def _with_extras(client: AsyncClient, server: Server, vocabulary: int) -> Server:
    """The server with the fields it takes.

    Raises:
        ConfigError: it takes no form of the request.
    """
    prompt = [FIRST_TOKEN] * (_PROBE_TOKENS - 1) + [vocabulary - 1]
    for extras in _EXTRAS:
        asked = Server(server.url, server.model, server.max_tokens, extras, server.headers)
        response = await client.post(f"{server.url}/v1/completions", json=_body(asked, prompt, _PROBE_TOKENS))
        if response.status_code == 200:
            return asked
        if response.status_code not in _WRONG_FIELD:
            break
    what = f"{response.status_code}: {error_message(response)}"
    raise ConfigError(
        f"{server.url}/v1/completions refuses a request of token ids up to {vocabulary - 1} ({what}): "
        "give --model, --api-key or a smaller --vocabulary"
    )


def _body(server: Server, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    fixed = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return fixed | server.extras


def _client(headers: dict[str, str]) -> AsyncClient:
    import httpx

    # As many connections as there are open requests, and no limits but the caller's on how long they take.
    return httpx.AsyncClient(headers=headers, timeout=None, limits=httpx.Limits(max_connections=None))
