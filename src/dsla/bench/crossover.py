"""Seconds of prefill and decode by level and context: where a level begins to be faster than full attention."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsla.bench.records import origin
from dsla.bench.roofline import read_bandwidth, step_bytes
from dsla.engine import Arena, PackedDecoder
from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.memory import RequestMemory
from dsla.errors import ConfigError

CHUNK_TOKENS = 512
STEPS = 8
_WARM_UP = 2

Seconds = dict[int, list[float]]
"""Context -> seconds of each round."""


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        levels: rising, 0 first.
        contexts: tokens, rising.
        batch: requests of a decode step.
        rounds: times everything is measured.
    """

    levels: tuple[int, ...]
    contexts: tuple[int, ...]
    batch: int = 1
    rounds: int = 3

    @classmethod
    def of(
        cls, decoder: PackedDecoder, levels: Sequence[int] | None, contexts: Sequence[int], batch: int, rounds: int
    ) -> Grid:
        """A grid that fits the model.

        Args:
            decoder: the model.
            levels: in any order; 0 is added. Default: quarters of all.
            contexts: in any order.
            batch: requests of a decode step.
            rounds: times everything is measured.

        Raises:
            ConfigError: a level or context that the model does not have.
        """
        top, longest = len(decoder.order), decoder.max_tokens - STEPS
        levels = [int(top * part / 4 + 0.5) for part in range(5)] if levels is None else levels
        if wrong := [level for level in levels if not 0 <= level <= top]:
            hint = "" if top else " (it has no adapter: make one with `dsla convert`)"
            raise ConfigError(f"--levels: level {wrong[0]} is out of range, this model has levels 0 ... {top}{hint}")
        if wrong := [context for context in contexts if not 1 <= context <= longest]:
            raise ConfigError(
                f"--contexts: {wrong[0]} tokens are out of range, this model reads 1 ... {longest:,} here"
            )
        return cls(tuple(sorted({0, *levels})), tuple(sorted(set(contexts))), batch, rounds)


@dataclass
class Timings:
    """Seconds of one level: of a prompt of so many tokens, and of a step that decodes after so many."""

    prefill: Seconds = field(default_factory=dict)
    decode: Seconds = field(default_factory=dict)


class Room:
    """Memory of some requests at one level; what it holds does not change how long a step takes.

    Args:
        decoder: the model.
        level: of all requests.
        batch: requests.
        tokens: each can remember.
    """

    def __init__(self, decoder: PackedDecoder, level: int, batch: int, tokens: int) -> None:
        self._decoder, converted = decoder, decoder.order[:level]
        probe = decoder.arena(1 << 20)
        pages = batch * (decoder.n_layers - level) * probe.page_count(tokens)
        # A slot lies in a block of its own: some units beside the last one stay empty.
        self.arena: Arena = decoder.arena((pages + (batch * level + 1) * probe.slot_units) * probe.page_bytes)
        for pool in self.arena.pages.values():
            pool.zero_()
        self._memories = [RequestMemory(self.arena, decoder.n_layers, converted) for _ in range(batch)]
        for memory in self._memories:
            memory.reserve(tokens)

    def prefill(self, contexts: Sequence[int]) -> list[float]:
        """Reads one random prompt, chunk by chunk.

        Args:
            contexts: lengths, rising.

        Returns:
            Seconds until the logits after each of them.
        """
        prompt = random.Random(0).choices(range(self._decoder.vocab_size), k=contexts[-1])
        seconds, at = [], 0
        begun = time.perf_counter()
        for context in contexts:
            while at < context:
                new = prompt[at : min(at + CHUNK_TOKENS, context)]
                self._forward([Segment(self._memories[0], new, at, at + len(new) == context)])
                at += len(new)
            seconds.append(time.perf_counter() - begun)
        return seconds

    def decode(self, context: int, steps: int = STEPS) -> list[float]:
        """Seconds of each of some steps of one token for every request, after `context` tokens."""
        seconds = []
        for step in range(steps):
            begun = time.perf_counter()
            self._forward([Segment(memory, [step], context + step, True) for memory in self._memories])
            seconds.append(time.perf_counter() - begun)
        return seconds

    def _forward(self, segments: Sequence[Segment]) -> None:
        self._decoder.forward(PackedBatch(segments, self._decoder.device), self.arena)


def measure(
    decoder: PackedDecoder, grid: Grid, on_part: Callable[[int, int], None] = lambda done, parts: None
) -> dict[str, Any]:
    """Measures a grid, round by round, all levels in each.

    Args:
        decoder: the model.
        grid: what to measure.
        on_part: called with parts done and all parts; a part is one level of one round.

    Returns:
        The record: medians, rooflines, crossovers and what every round gave, as plain data.

    Raises:
        EngineError: there is not enough memory.
    """
    timings = {level: Timings() for level in grid.levels}
    bandwidths: list[float] = []
    for done in range(grid.rounds):
        bandwidths.append(read_bandwidth())
        for place, level in enumerate(grid.levels):
            on_part(done * len(grid.levels) + place, grid.rounds * len(grid.levels))
            _one_round(decoder, level, grid, timings[level])
    on_part(grid.rounds * len(grid.levels), grid.rounds * len(grid.levels))
    return _record(decoder, grid, timings, bandwidths)


def crossing(contexts: Sequence[int], base: Sequence[float], other: Sequence[float]) -> float | None:
    """The context from which `other` is first faster than `base`, between two measured ones by straight lines.

    Args:
        contexts: rising.
        base: seconds at each.
        other: seconds at each.

    Returns:
        The first context where `other` is faster from the start; None where it never is.
    """
    gains = [b - o for b, o in zip(base, other, strict=True)]
    for i, gain in enumerate(gains):
        if gain > 0:
            if i == 0:
                return float(contexts[0])
            share = -gains[i - 1] / (gain - gains[i - 1])
            return contexts[i - 1] + share * (contexts[i] - contexts[i - 1])
    return None


def _one_round(decoder: PackedDecoder, level: int, grid: Grid, timings: Timings) -> None:
    room = Room(decoder, level, grid.batch, grid.contexts[-1] + STEPS)
    for context, seconds in zip(grid.contexts, room.prefill(grid.contexts), strict=True):
        timings.prefill.setdefault(context, []).append(seconds)
    for context in grid.contexts:
        # The first steps also build what later ones reuse.
        steady = room.decode(context)[_WARM_UP:]
        timings.decode.setdefault(context, []).append(statistics.median(steady))


def _record(decoder: PackedDecoder, grid: Grid, timings: dict[int, Timings], bandwidths: list[float]) -> dict[str, Any]:
    bandwidth = max(bandwidths)
    medians = {
        level: {name: [statistics.median(found[c]) for c in grid.contexts] for name, found in vars(of_level).items()}
        for level, of_level in timings.items()
    }
    rows = []
    for level in grid.levels:
        moved = [step_bytes(decoder, level, context, grid.batch) for context in grid.contexts]
        prefill, decode = medians[level]["prefill"], medians[level]["decode"]
        rows.append(
            {
                "level": level,
                "prefill_seconds": prefill,
                "decode_seconds": decode,
                "prefill_tokens_per_second": [c / s for c, s in zip(grid.contexts, prefill, strict=True)],
                "decode_tokens_per_second": [grid.batch / s for s in decode],
                "decode_bytes": [asdict(one) | {"total": one.total} for one in moved],
                "decode_roofline_seconds": [one.total / bandwidth for one in moved],
                "prefill_crossover": crossing(grid.contexts, medians[0]["prefill"], prefill) if level else None,
                "decode_crossover": crossing(grid.contexts, medians[0]["decode"], decode) if level else None,
                "rounds": asdict(timings[level]),
            }
        )
    return {
        "kind": "dsla bench crossover",
        **origin(),
        "settings": {
            "layers": decoder.n_layers,
            "levels": list(grid.levels),
            "contexts": list(grid.contexts),
            "batch": grid.batch,
            "rounds": grid.rounds,
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "int4": decoder.int4,
            "chunk_tokens": CHUNK_TOKENS,
        },
        "read_bandwidth": bandwidths,
        "rows": rows,
    }
