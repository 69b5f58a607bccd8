"""Open files: each connection takes one, and many systems let a program have no more than 1,024 unless it asks for more."""

from __future__ import annotations

import contextlib

WANTED_FILES = 65_536
"""Open files a server asks for, as far as the system's hard limit allows."""


def file_limits() -> tuple[int, int] | None:
    """How many files this process may open, and up to how many it may raise that, `WANTED_FILES` where there is no bound.

    Returns:
        both; None = the system has no such limits.
    """
    try:
        import resource
    except ModuleNotFoundError:
        return None
    soft, hard = (
        WANTED_FILES if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard


def raise_file_limit() -> int | None:
    """Lets this process open as many files as it may, up to `WANTED_FILES`, and never fewer than before.

    Returns:
        how many it may open now; None = the system has no such limit.
    """
    limits = file_limits()
    if limits is None:
        return None
    import resource

    wanted = min(WANTED_FILES, limits[1])
    if limits[0] >= wanted:
        return limits[0]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return wanted
    return limits[0]
