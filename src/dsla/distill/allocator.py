"""Memory that training frees and asks for again at every step, kept by the process instead of given back each time."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _PAD = -1, 64 << 20


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed; large tensors then do not cost page faults at every step.

    It holds for the whole process, whose memory no longer shrinks: for programs that train and end.

    Returns:
        Whether there is such a malloc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all((mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_TOP_PAD, _PAD)))
