"""How the HTTP side of the server behaves: keys, limits, other origins."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from dsla.errors import ConfigError
from dsla.server.protocol import MAX_PROMPTS

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP side.

    Attributes:
        api_keys: any of them opens the API; none = it is open to everyone who reaches it under a name of this machine.
        any_host: whether, without API keys, it is open under any other host name too.
        admin_key: opens `/admin`; None = `/admin` answers to this machine only, and not at all where there are API keys.
        max_body_bytes: bytes of a request's body, at most; longer ones are answered 413. Those of all open requests together
            may have 32 times as many; what comes beyond is answered 429.
        max_answers: answers one request may ask for, prompts times `n`, at most; 256 are the most there can be.
        max_concurrent: requests of one key, or of all callers together where there are no keys, that may be open at once;
            more are answered 429. None = as many as come.
        request_seconds: time of a request, from its first byte to the last of its answer, at most; None = no bound.
        cors_origins: other origins whose pages may ask, as `https://example.org`; `*` = all.

    Raises:
        ConfigError: if a key or a limit is none; messages never hold a key.
    """

    api_keys: tuple[str, ...] = ()
    any_host: bool = False
    admin_key: str | None = None
    max_body_bytes: int = 8 << 20
    max_answers: int = MAX_PROMPTS
    max_concurrent: int | None = None
    request_seconds: float | None = 600.0
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, keys in (("API key", self.api_keys), ("admin key", (self.admin_key,) if self.admin_key else ())):
            for place, key in enumerate(keys, 1):
                if not key or not key.isascii() or not key.isprintable() or " " in key or "," in key:
                    rule = "must be printable ASCII characters, without spaces and commas"
                    raise ConfigError(f"{name} {place} {rule}; several in the environment are separated by spaces")
        if self.admin_key == "":
            raise ConfigError("the admin key is empty: leave it out, or give one")
        if self.admin_key in self.api_keys:
            raise ConfigError("the admin key is an API key too: whoever uses the API could administer the server")
        for limit in ("max_body_bytes", "max_answers", "max_concurrent"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ConfigError(f"{limit} must be at least 1, found {value}")
        if self.max_answers > MAX_PROMPTS:
            raise ConfigError(f"max_answers must be at most {MAX_PROMPTS}, found {self.max_answers}")
        if self.request_seconds is not None and not self.request_seconds > 0:
            raise ConfigError(f"request_seconds must be positive, found {self.request_seconds}")
        for origin in self.cors_origins:
            written = _as_browsers_write(origin)
            if origin != written:
                hint = f": give {written!r}" if written else ""
                raise ConfigError(f"an origin is written as https://example.org or *, found {origin!r}{hint}")


def _as_browsers_write(origin: str) -> str | None:
    """An origin as it stands in the header, which must be equal: scheme, host, and port unless it is the usual one."""
    if origin == "*":
        return origin
    try:
        parts = urlsplit(origin)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not host or not host.isascii():
        return None
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + (f":{port}" if port not in (None, _PORTS[parts.scheme]) else "")
