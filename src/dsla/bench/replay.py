"""Sends requests to a server with OpenAI's API at the times a trace says, whether it keeps up or not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsla.bench.goodput import CANCELLED, DONE, FAILED, REJECTED, Outcome
from dsla.bench.prompts import FIRST_TOKEN, prompt_tokens
from dsla.bench.trace import TraceRequest
from dsla.errors import ConfigError

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

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
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with _client(headers) as client:
        try:
            async with asyncio.timeout(timeout):
                listed = await client.get(f"{base}/v1/models")
                card = _card(listed, base, model)
                name, limit = card["id"], card.get("max_model_len")
                server = Server(base, name, limit if type(limit) is int else None, {}, headers)
                return await _with_extras(client, server, vocabulary)
        except TimeoutError:
            raise ConfigError(f"the server at {base} did not answer within {timeout:g} s") from None
        except _http_errors() as error:
            why = str(error) or type(error).__name__
            raise ConfigError(
                f"no server answers at {base} ({why}): start one with `dsla serve`, or fix the URL"
            ) from None


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
        except _http_errors() as error:
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
                self.end(REJECTED if refused else FAILED, f"{response.status_code}: {_message(response)}")
                return
            async for event in _events(response):
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


async def _events(response: Response) -> AsyncIterator[dict[str, Any]]:
    """Objects of a stream of server-sent events, until `[DONE]`."""
    # Not `aiter_lines`, for which a line may end at characters that JSON texts hold as they are, such as U+2028.
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)


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
    what = f"{response.status_code}: {_message(response)}"
    raise ConfigError(
        f"{server.url}/v1/completions refuses a request of token ids up to {vocabulary - 1} ({what}): "
        "give --model, --api-key or a smaller --vocabulary"
    )


def _body(server: Server, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    fixed = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return fixed | server.extras


def _card(listed: Response, base: str, model: str | None) -> dict[str, Any]:
    """The model asked for, or the first, as `/v1/models` lists it."""
    if listed.status_code in (401, 403):
        raise ConfigError(f"the server at {base} wants a key: give it with --api-key")
    try:
        cards = [card for card in listed.json()["data"] if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        if model is not None:
            return {"id": model}
        what = f"its /v1/models answers {listed.status_code}"
        raise ConfigError(f"{base} is no server with OpenAI's API ({what}): fix the URL, or give --model") from None
    found = next((card for card in cards if model in (None, card["id"])), None)
    if found is None:
        names = ", ".join(card["id"] for card in cards) or "none"
        raise ConfigError(f"the server at {base} has the models {names}; --model asks for {model or 'any'}")
    return dict(found)


def _message(response: Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _client(headers: dict[str, str]) -> AsyncClient:
    import httpx

    # As many connections as there are open requests, and no limits but the caller's on how long they take.
    return httpx.AsyncClient(headers=headers, timeout=None, limits=httpx.Limits(max_connections=None))


def _http_errors() -> tuple[type[Exception], ...]:
    import httpx

    return (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, json.JSONDecodeError)
