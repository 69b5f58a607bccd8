"""One request and its answer, as far as the log, the metrics and the limits know it."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from starlette.types import Scope

ANYONE = "anyone"
"""The caller where no keys are in use."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass
class Exchange:
    """A request on its way through the server.

    Attributes:
        id: its name in logs, in the header `X-Request-Id` of the answer, and as the beginning of the engine's names.
        began: when it came, seconds of the event loop.
        caller: name of the key it showed, never the key itself.
        prompt_tokens: tokens of its prompts.
        completion_tokens: tokens generated so far, of all answers.
        body_bytes: bytes of its body that have come.
    """

    id: str
    began: float
    caller: str = ANYONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    body_bytes: int = 0

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        """The one that `Access` made for a request."""
        exchange: Exchange = scope["state"]["exchange"]
        return exchange


def request_id(asked: str | None) -> str:
    """The id a client asks for, where it is 1 to 64 letters, digits and `._:-`; else a new one."""
    return asked if asked is not None and _ID.fullmatch(asked) else uuid.uuid4().hex
