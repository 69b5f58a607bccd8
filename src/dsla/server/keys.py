"""Keys: which caller a request's key belongs to, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from dsla.errors import ConfigError

ADMIN = "admin"
"""Name of the caller who shows the admin key."""


class Keys:
    """The keys of a server. Only their digests are kept.

    Args:
        api: keys that open the API.
        admin: the key that opens `/admin`, or None.

    Attributes:
        has_api: whether the API needs a key.
        has_admin: whether there is an admin key.
    """

    def __init__(self, api: tuple[str, ...], admin: str | None) -> None:
        self.has_api, self.has_admin = bool(api), admin is not None
        named = [(f"key {place}", key) for place, key in enumerate(api, 1)]
        named += [(ADMIN, admin)] if admin is not None else []
        self._digests = [(name, _digest(key)) for name, key in named]

    def caller(self, authorization: str | None) -> str | None:
        """Whose key an `Authorization` header shows: `key 1`, `key 2`, ..., `admin`; None if it is nobody's.

        All keys are compared, whichever fits, and their digests rather than they: the time it takes tells nothing of them.
        """
        scheme, _, shown = (authorization or "").partition(" ")
        found, digest = None, _digest(shown.strip())
        for name, known in self._digests:
            if hmac.compare_digest(known, digest):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_keys(path: str) -> tuple[str, ...]:
    """Keys from a file: one a line; empty lines and those that begin with `#` are left out.

    Raises:
        ConfigError: the file cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8"
        raise ConfigError(f"the key file {path} cannot be read: {why}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"the key file {path} holds no key: write one a line")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
