"""How many threads to compute with, the number that a decode step and a small prompt chunk are fastest with; and an end to
those of a thread that computes no more.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dsla.engine.decoder import PackedDecoder
from dsla.engine.measure import Point, Scratch
from dsla.engine.remembered import facts_of, remembered
from dsla.errors import EngineError

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CONTEXT, _CHUNK = 256, 64
_ROUNDS = 5
_SECONDS = 1.0
_TIE = 1.05
_SOFT = 1  # omp_pause_soft

_log = logging.getLogger(__name__)


def best_threads(decoder: PackedDecoder) -> int:
    """The number of threads this model computes fastest with, measured at the first start and remembered.

    Tried are one thread, one a physical core, and one a logical core of those this process may use; `OMP_NUM_THREADS` and a
    quota of its control group are upper bounds. A decode row after a short context and a prompt chunk of 64 tokens count
    equally: what decides is the product of their times. Where numbers differ by less than 5 per cent, the least is taken.
    On a GPU, PyTorch's number stays.

    Args:
        decoder: the model. PyTorch's number of threads is as before afterwards.
    """
    found = bounds().candidates
    if decoder.device.type != "cpu":
        return torch.get_num_threads()
    if len(found) == 1:
        return found[0]
    facts = {**facts_of(decoder), "candidates": list(found)}
    return remembered("threads", facts, lambda: _measure(decoder, found), int, lambda data: _restore(data, found))


@dataclass(frozen=True)
class Bounds:
    """What bounds the number of threads here.

    Attributes:
        logical: logical cores that this process may use.
        physical: physical cores among them.
        variable: what `OMP_NUM_THREADS` asks for; None = it is not set, or to no number.
        quota: cores' worth of time that the control group grants; None = there is no quota.
    """

    logical: int
    physical: int
    variable: int | None
    quota: int | None

    @property
    def most(self) -> int:
        """The most threads worth trying."""
        return min(bound for bound in (self.logical, self.variable, self.quota) if bound is not None)

    @property
    def candidates(self) -> tuple[int, ...]:
        """Numbers of threads worth trying, least first."""
        return tuple(sorted({1, min(self.physical, self.most), self.most}))


def bounds() -> Bounds:
    """What bounds the number of threads of this process."""
    usable = _usable()
    return Bounds(len(usable), _physical(usable), _variable(), _quota())


def release_threads() -> None:
    """Ends the OpenMP threads that wait for the calling thread's next computation, if any; that one would make new ones.

    Each thread that computes has helpers of its own, and GNU's OpenMP counts them: with more in a process than processors, all
    of them sleep between two loops in place of spinning, which costs a server whose engine has a thread of its own a fifth of
    its speed. See `omp_pause_resource_all` in OpenMP 5.0; a library without it is left alone.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical(usable: set[int]) -> int:
    """Physical cores among logical ones; all of them where the system does not say which belong together."""
    try:
        return len({(_TOPOLOGY / f"cpu{i}/topology/thread_siblings_list").read_text().strip() for i in usable})
    except OSError:
        return len(usable)


def _variable() -> int | None:
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdecimal() and int(first) else None


def _quota() -> int | None:
    try:
        quota, period = _QUOTA.read_text().split()
        return max(math.ceil(int(quota) / int(period)), 1)
    except (OSError, ValueError):
        _log.debug("no quota of processor time")  # there is no such file, or it says `max`
        return None


def _measure(decoder: PackedDecoder, numbers: tuple[int, ...]) -> int:
    scratch = Scratch(decoder, min(_CONTEXT, decoder.max_tokens - 1))
    chunk = max(min(_CHUNK, scratch.context), 2)
    points = (Point(((0, scratch.context, 1),)), Point(((0, 0, chunk),)))
    before = torch.get_num_threads()
    times = {number: [math.inf] * len(points) for number in numbers}
    try:
        for point in points:
            scratch.time(point)
        begun = time.perf_counter()
        for done in range(1, _ROUNDS + 1):
            for number in reversed(numbers):
                torch.set_num_threads(number)
                times[number] = [
                    min(best, scratch.time(point)) for best, point in zip(times[number], points, strict=True)
                ]
            if (time.perf_counter() - begun) * (done + 1) / done > _SECONDS:
                break
    finally:
        torch.set_num_threads(before)
    return fastest({number: math.prod(best) for number, best in times.items()})


def fastest(products: dict[int, float]) -> int:
    """The least number of threads that is as good as the best, but for noise.

    Args:
        products: number of threads -> product of two times.
    """
    least = min(products.values())
    return min(number for number, product in products.items() if product <= least * _TIE**2)


def _restore(data: object, numbers: tuple[int, ...]) -> int:
    if type(data) is not int or data not in numbers:
        raise EngineError(f"expected one of {numbers}, found {data!r}")
    return data
