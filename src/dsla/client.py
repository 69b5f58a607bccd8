"""Talking to a server with OpenAI's API: where it is, which model it has, its streams, and what is wrong where it fails.

httpx sends the requests; it is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from dsla.errors import ConfigError

if TYPE_CHECKING:
    from httpx import Response

_UNAUTHORIZED, _FORBIDDEN = 401, 403
_MESSAGE = 200


def server_root(url: str) -> str:
    """Address of a server without the `/v1` that its API has."""
    return url.rstrip("/").removesuffix("/v1")


def key_headers(api_key: str | None) -> dict[str, str]:
    """Headers that bring a key, where there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def http_errors() -> tuple[type[Exception], ...]:
    """What httpx and the reading of streams raise where a server is not there, breaks off, or is no such server."""
    import httpx

    return (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, json.JSONDecodeError)


def no_server(root: str, error: Exception) -> ConfigError:
    """The error of a server that does not answer."""
    why = str(error) or type(error).__name__
    return ConfigError(f"no server answers at {root} ({why}): start one with `dsla serve`, or fix the URL")


def check_key(response: Response, root: str) -> None:
    """Checks that a server did not refuse a request for its key, or for who sent it.

    Raises:
        ConfigError: it did.
    """
    if response.status_code == _FORBIDDEN:
        raise ConfigError(f"the server at {root} does not let us in: {error_message(response)}")
    if response.status_code == _UNAUTHORIZED:
        wanted = "refuses the key" if "authorization" in response.request.headers else "wants a key"
        raise ConfigError(f"the server at {root} {wanted}: give one with --api-key ({error_message(response)})")


def model_card(listed: Response, root: str, model: str | None) -> dict[str, Any]:
    """What a server says of a model.

    Args:
        listed: its answer to `GET /v1/models`.
        root: its address.
        model: name of the model; None = the first it lists.

    Returns:
        The entry, which has an `id`; nothing but that where the server lists no models and one was named.

    Raises:
        ConfigError: it wants a key, is no such server, or does not have the model.
    """
    check_key(listed, root)
    try:
        cards = [card for card in listed.json()["data"] if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        if model is not None:
            return {"id": model}
        what = f"its /v1/models answers {listed.status_code}"
        raise ConfigError(f"{root} is no server with OpenAI's API ({what}): fix the URL, or give --model") from None
    found = next((card for card in cards if model in (None, card["id"])), None)
    if found is None:
        names = ", ".join(card["id"] for card in cards) or "none"
        raise ConfigError(f"the server at {root} has the models {names}; --model asks for {model or 'any'}")
    return dict(found)


def error_message(response: Response) -> str:
    """What an answer that is an error says, shortened."""
    try:
        return str(response.json()["error"]["message"])[:_MESSAGE]
    except (ValueError, KeyError, TypeError):
        return response.text[:_MESSAGE]


async def stream_events(response: Response) -> AsyncIterator[dict[str, Any]]:
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
