"""Level histories: `(from_token, level)`, in order; tokens from `from_token` on were computed at `level`.

A request's tokens follow from its prompt, its level history and its seed, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

History = list[tuple[int, int]]


def before(levels: Sequence[tuple[int, int]], token: int) -> History:
    """The entries that say how the tokens before `token` were computed."""
    return [entry for entry in levels if entry[0] < token]


def level_at(levels: Sequence[tuple[int, int]], token: int) -> int:
    """The level `token` is computed at."""
    return before(levels, token + 1)[-1][1]


def extended(levels: Sequence[tuple[int, int]], token: int, level: int) -> History:
    """The history with `level` from `token` on; one entry for all changes at one token."""
    history = before(levels, token)
    if not history or history[-1][1] != level:
        history.append((token, level))
    return history
