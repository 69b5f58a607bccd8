"""Measures the coefficients of the cost model: forwards of the decoder on memory of its own, and folds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch

from dsla.engine.arena import Arena
from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.cost import CostModel, StepWork
from dsla.engine.decoder import PackedDecoder
from dsla.engine.memory import RequestMemory
from dsla.engine.remembered import facts_of, remembered

_ROWS = 4
_SHORT, _LONG = 32, 2048
_CHUNK, _PROBE = 256, 16
_SCRATCH_BYTES = 256 << 20
_ROUNDS = 10
_SHARE = 1 / 30
_SURE = 1 / 60
"""Part of the time for all rounds that a step may take where there is time for several of them."""


def load_or_measure(decoder: PackedDecoder, seconds: float = 3.0) -> CostModel:
    """The cost model of a decoder, measured at the first start and remembered for the next ones.

    Where steps took so long that few of them could be timed, on a slow machine or on one that was busy, the next start
    measures again.

    Args:
        decoder: the model.
        seconds: time to measure for, about.
    """
    facts = {**facts_of(decoder), "threads": torch.get_num_threads()}

    def sure(costs: CostModel) -> bool:
        return costs.base <= _SURE * seconds

    return remembered("costs", facts, lambda: measure(decoder, seconds), asdict, _restore, sure)


def measure(decoder: PackedDecoder, seconds: float = 3.0) -> CostModel:
    """Times decode rows and prompt chunks, short and long, at level 0 and at the highest, and folds; then fits the costs.

    Of several rounds each measurement's shortest counts, since other programs can only make it longer. With one thread the
    processor's time is taken, which leaves out most of what they do.

    Args:
        decoder: the model.
        seconds: time for all rounds, about; there is always one, with shorter prompt chunks where the machine is slow.
    """
    begun = time.perf_counter()
    alone = decoder.device.type == "cpu" and torch.get_num_threads() == 1
    scratch = Scratch(decoder, clock=time.thread_time if alone else time.perf_counter)
    points = _points(decoder, scratch.context, _chunk(scratch, seconds * _SHARE))
    best = [float("inf")] * len(points)
    folds: dict[int, float] = {}
    for done in range(1, _ROUNDS + 1):
        best = [min(known, scratch.time(point)) for known, point in zip(best, points, strict=True)]
        if decoder.order and decoder.foldable:
            for tokens in (_clipped(_SHORT, scratch.context), scratch.context):
                folds[tokens] = min(folds.get(tokens, float("inf")), scratch.time_fold(tokens))
        if (time.perf_counter() - begun) * (done + 1) / done > seconds:
            break
    # A byte of states costs no less than one of keys and values: what both move is told apart from what else a row takes,
    # which so few steps would leave to chance.
    keys = decoder.slot_bytes_moved / decoder.kv_spec.bytes_per_token
    works = [_in_keys(point.work(decoder), keys) for point in points]
    costs = CostModel(*[*fit(works, best), *_line(folds)])
    return replace(costs, decode_converted=costs.decode_converted + keys * costs.decode_pair)


def _in_keys(work: StepWork, keys: float) -> StepWork:
    """The work, what a row moves in a converted layer counted as reads of so many keys, too."""
    return replace(work, decode_pairs=work.decode_pairs + round(keys * work.decode_converted))


@dataclass(frozen=True)
class Point:
    """A step to time: prompt chunks and decode rows, each `(level, prior tokens, new tokens)`."""

    parts: tuple[tuple[int, int, int], ...]

    def work(self, decoder: PackedDecoder) -> StepWork:
        """Its work."""
        total = StepWork()
        for level, prior, new in self.parts:
            kept = decoder.n_layers - level
            one = StepWork.decode(prior, kept, level) if new == 1 else StepWork.prefill(new, prior, kept, level)
            total += one
        return total


class Scratch:
    """Memory to time steps on. Keys and values are zeros: what they hold does not change how long a step takes.

    Args:
        decoder: the model.
        context: tokens of a request, at most. Default: about two thousand, fewer where the model or a few hundred MiB
            hold fewer.
        clock: seconds.

    Attributes:
        context: tokens of a request, at most.
    """

    def __init__(
        self, decoder: PackedDecoder, context: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._decoder, self._clock = decoder, clock
        probe = decoder.arena(1 << 20)
        n_layers, top = decoder.n_layers, len(decoder.order)
        # Some rows at level 0, as many at the highest one, and a request to fold a layer of.
        layers, slots = _ROWS * (2 * n_layers - top) + n_layers, _ROWS * top + 2
        held = max(_SCRATCH_BYTES // (layers * decoder.kv_spec.bytes_per_token), _SHORT)
        self.context = context or min(_LONG, decoder.max_tokens - 1, held)
        units = layers * probe.page_count(self.context + 1) + slots * probe.slot_units
        self._arena: Arena = decoder.arena(units * probe.page_bytes)
        for pool in self._arena.pages.values():
            pool.zero_()
        self._memories: dict[int, list[RequestMemory]] = {}

    def time(self, point: Point) -> float:
        """Seconds of one step."""
        used: dict[int, int] = {}
        segments = []
        for level, prior, new in point.parts:
            place = used[level] = used.get(level, -1) + 1
            segments.append(Segment(self._memory(level, place), [1] * new, prior, new == 1))
        return self._timed(lambda: self._decoder.forward(PackedBatch(segments, self._decoder.device), self._arena))

    def time_fold(self, tokens: int) -> float:
        """Seconds to convert one layer of a request."""
        decoder = self._decoder
        memory = RequestMemory(self._arena, decoder.n_layers, ())
        memory.reserve(tokens)
        layer = decoder.order[0]
        # Its pages may have held states before, which are no numbers if they are read as keys.
        self._arena.set_page_data(memory.table(layer), torch.zeros((), dtype=torch.uint8))
        seconds = self._timed(lambda: memory.fold(layer, decoder.mixers[layer], tokens))
        memory.release()
        return seconds

    def _memory(self, level: int, place: int) -> RequestMemory:
        known = self._memories.setdefault(level, [])
        while len(known) <= place:
            memory = RequestMemory(self._arena, self._decoder.n_layers, self._decoder.order[:level])
            memory.reserve(self.context + 1)
            known.append(memory)
        return known[place]

    def _timed(self, run: Callable[[], Any]) -> float:
        device = self._decoder.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = self._clock()
        with torch.inference_mode():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock() - begun


def fit(works: Sequence[StepWork], seconds: Sequence[float]) -> list[float]:
    """Costs >= 0 of a step and of each count of its work, with the least squared relative error.

    Every set of costs is tried as the zero ones: there are few, and the best of them is the constrained optimum.

    Args:
        works: of at least one step.
        seconds: what each took.

    Returns:
        Seconds of a step, then of each attribute of `StepWork` in order; 0 for what no step contains.
    """
    counts = np.array([(1, *astuple(work)) for work in works], dtype=np.float64)
    scaled = counts / np.array(seconds)[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    present = np.flatnonzero(norms)
    scaled = scaled[:, present] / norms[present]
    subsets = chain.from_iterable(combinations(range(len(present)), n) for n in range(1, len(present) + 1))
    best, error = np.zeros(len(present)), float("inf")
    for subset in map(list, subsets):
        solution = np.linalg.lstsq(scaled[:, subset], np.ones(len(seconds)), rcond=None)[0]
        left = float(np.square(scaled[:, subset] @ solution - 1).sum())
        if (solution >= 0).all() and left < error:
            best, error = np.zeros(len(present)), left
            best[subset] = solution
    costs = np.zeros(counts.shape[1])
    costs[present] = best / norms[present]
    return [float(cost) for cost in costs]


def _points(decoder: PackedDecoder, context: int, chunk: int) -> list[Point]:
    top = len(decoder.order)
    short, few = _clipped(_SHORT, context), max(chunk // 4, 2)
    parts = [((0, prior, 1),) * rows for prior in (short, context) for rows in (1, _ROWS)]
    parts += [((0, 0, few),), ((0, 0, chunk),), ((0, context - chunk, chunk),)]
    if top:
        parts += [((top, short, 1),) * rows for rows in (1, _ROWS)]
        parts += [((top, 0, few),), ((top, context - chunk, chunk),)]
        parts += [((top, 0, few), *((0, context, 1),) * (_ROWS - 1))]
        parts += [((top, short, 1),) * (_ROWS // 2) + ((0, short, 1),) * (_ROWS // 2)]
    return [Point(part) for part in parts]


def _chunk(scratch: Scratch, seconds: float) -> int:
    """Tokens of a prompt chunk that takes `seconds`, about."""
    longest = _clipped(_CHUNK, scratch.context)
    probe = Point(((0, 0, min(_PROBE, longest)),))
    scratch.time(probe)
    return max(min(int(_PROBE * seconds / scratch.time(probe)), longest), min(_PROBE, longest))


def _clipped(tokens: int, context: int) -> int:
    return max(min(tokens, context // 4), 1)


def _line(folds: dict[int, float]) -> tuple[float, float]:
    """Constant and slope >= 0 of the line through two timed folds, or zeros where none was timed."""
    if not folds:
        return 0.0, 0.0
    (fewer, least), (more, most) = min(folds.items()), max(folds.items())
    slope = max((most - least) / (more - fewer), 0.0) if more > fewer else 0.0
    return max(least - fewer * slope, 0.0), slope


def _restore(data: Any) -> CostModel:
    return CostModel(**{name: float(value) for name, value in dict(data).items()})
