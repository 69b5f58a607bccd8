"""Snapshots are found, known, replaced and forgotten as a comparison with every one of them would have it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsla.engine.arena import Arena
from dsla.engine.history import History, before
from dsla.engine.memory import RequestMemory
from dsla.engine.prefix import PrefixCache, Snapshot
from tests.engine.test_arena import KV, slot_spec

LAYERS = 3
PAGE_TOKENS, PAGE_BYTES = 4, 256


def shared(snapshot: Snapshot, tokens: np.ndarray) -> int:
    """Tokens a text can take from a snapshot."""
    common = 0
    while common < min(len(snapshot.tokens), len(tokens)) and snapshot.tokens[common] == tokens[common]:
        common += 1
    return common if snapshot.level == 0 or common == len(snapshot.tokens) else 0


class PlainCache(PrefixCache):
    """The cache with every search through all snapshots."""

    def find(
        self, tokens: np.ndarray, accepts: Callable[[Snapshot, int], bool] = lambda snapshot, count: True
    ) -> tuple[Snapshot, int] | None:
        found = [(shared(snapshot, tokens[:-1]), snapshot) for snapshot in self._snapshots]
        found = [(count, snapshot) for count, snapshot in found if count >= PAGE_TOKENS and accepts(snapshot, count)]
        count, best = max(found, key=lambda pair: (pair[0], -pair[1].level), default=(0, None))
        return None if best is None else (best, count)

    def forget(self, tokens: np.ndarray) -> None:
        for snapshot in list(self._snapshots):
            if shared(snapshot, tokens) >= min(PAGE_TOKENS, len(tokens)):
                self._drop(snapshot)

    def _known(self, text: bytes, levels: History) -> bool:
        tokens = np.frombuffer(text, dtype=np.int64)
        for snapshot in self._snapshots:
            if shared(snapshot, tokens) == len(tokens) and before(snapshot.levels, len(tokens) + 1) == levels:
                self._remove(snapshot)
                self._put(snapshot)
                return True
        return False

    def _keep(self, snapshot: Snapshot) -> None:
        for other in list(self._snapshots):
            if other.level == snapshot.level == 0 and shared(snapshot, other.tokens) == len(other.tokens):
                self._drop(other)
        self._put(snapshot)
        self.trim()


class Twins:
    """The cache and the plain one, each with an arena of its own, under the same actions."""

    def __init__(self, units: int, limit: int | None) -> None:
        arenas = [Arena(units * PAGE_BYTES, KV, slot_spec(6), page_tokens=PAGE_TOKENS) for _ in range(2)]
        self.caches = [PrefixCache(arenas[0], limit), PlainCache(arenas[1], limit)]
        self.arenas = arenas

    def add(self, text: list[int], levels: History, ended: bool) -> None:
        level = levels[-1][1]
        for arena, cache in zip(self.arenas, self.caches, strict=True):
            memory = RequestMemory(arena, LAYERS, range(level))
            if memory.units_to_hold(len(text)) > arena.free_units:
                continue
            memory.reserve(len(text))
            if ended:
                cache.add_ended(text, levels, memory)
            else:
                cache.add(text, levels, memory)
                memory.release()

    def find(self, text: list[int], accepted: set[int], takes: bool) -> None:
        found = [cache.find(np.array(text), lambda hit, count: hit.level in accepted) for cache in self.caches]
        fine, plain = ((facts(hit[0]), hit[1]) if hit else None for hit in found)
        assert fine == plain
        for arena, cache, hit in zip(self.arenas, self.caches, found, strict=True):
            if hit and takes and cache.units(*hit) <= arena.free_units:
                cache.take(*hit).release()

    def forget(self, text: list[int]) -> None:
        for cache in self.caches:
            cache.forget(np.array(text, dtype=np.int64))

    def check(self) -> None:
        fine, plain = ([facts(snapshot) for snapshot in cache._snapshots] for cache in self.caches)
        assert fine == plain
        assert self.arenas[0].kept_bytes == self.arenas[1].kept_bytes
        by_page = [snapshot for snapshots in self.caches[0]._by_page.values() for snapshot in snapshots]
        assert set(by_page) == set(self.caches[0]._snapshots) and all(self.caches[0]._by_page.values())


def facts(snapshot: Snapshot) -> tuple[list[int], History, int]:
    return snapshot.tokens.tolist(), snapshot.levels, snapshot.memory.units


# Beginnings of two texts, with little or nothing else behind them.
texts = st.tuples(st.integers(0, 1), st.integers(1, 12), st.lists(st.integers(0, 1), max_size=2)).map(
    lambda parts: [parts[0]] * parts[1] + parts[2]
)
levels = st.one_of(
    st.just([(0, 0)]),
    st.integers(0, LAYERS).map(lambda level: [(0, level)]),
    st.tuples(st.integers(0, 2), st.integers(1, 14)).map(lambda pair: [(0, pair[0]), (pair[1], pair[0] + 1)]),
)
actions = st.one_of(
    st.tuples(st.just("add"), texts, levels, st.booleans()),
    st.tuples(st.just("find"), texts, st.sets(st.integers(0, LAYERS)), st.booleans()),
    st.tuples(st.just("forget"), texts),
)


@settings(max_examples=300, deadline=None)
@given(
    units=st.integers(9, 120),
    limit=st.sampled_from([None, None, 0, 30 * PAGE_BYTES]),
    doings=st.lists(actions, min_size=10, max_size=40),
)
def test_any_sequence_finds_what_a_plain_search_finds(
    units: int, limit: int | None, doings: list[tuple[Any, ...]]
) -> None:
    twins = Twins(units, limit)
    for name, *arguments in doings:
        getattr(twins, name)(*arguments)
        twins.check()
    for arena, cache in zip(twins.arenas, twins.caches, strict=True):
        cache.clear()
        assert arena.unused_units == arena.n_units


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("common", [0, 5])
def test_a_search_compares_few_of_many_snapshots(level: int, common: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None that begins otherwise; of those that begin alike at level 0, those that could be better than the best so far."""
    arena = Arena(8000 * PAGE_BYTES, KV, slot_spec(6), page_tokens=PAGE_TOKENS)
    cache, draw = PrefixCache(arena), random.Random(0)

    def text() -> list[int]:
        return [9] * common + [draw.randrange(10**6) for _ in range(7)]

    for _ in range(300):
        memory = RequestMemory(arena, LAYERS, range(level))
        memory.reserve(common + 7)
        cache.add_ended(text(), [(0, level)], memory)
    assert len(cache) == 300
    compared: list[Snapshot] = []
    shares = Snapshot.shares
    monkeypatch.setattr(Snapshot, "shares", lambda self, text: compared.append(self) or shares(self, text))
    wanted = list(cache._snapshots)[200].tokens
    for tokens, most in ((wanted, 7 + common), (np.array(text()), common if not level else 0)):
        compared.clear()
        found = cache.find(np.append(tokens, 1))
        assert (found[1] if found else 0) == most
        assert len(compared) <= (300 if common and level else 2)
