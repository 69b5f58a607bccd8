"""The arena against a model of it: data of every owner stays intact, every freed byte is usable, bytes add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsla.engine.arena import Arena
from dsla.engine.pages import PageTable
from dsla.errors import EngineError
from dsla.mixers.base import StateSpec, TensorSpec

KV = StateSpec(per_token={"k": TensorSpec((2, 4), torch.float32), "v": TensorSpec((2, 4), torch.float32)}, fixed={})
PAGE_TOKENS = 2
PAGE_BYTES = 2 * PAGE_TOKENS * 2 * 4 * 4


def slot_spec(units: int) -> StateSpec:
    """Mixed dtypes and odd sizes that take `units` pages."""
    states = TensorSpec((units * PAGE_BYTES // 4 - 24,), torch.float32)
    return StateSpec(
        per_token={},
        fixed={
            "states": states,
            "window": TensorSpec((3, 3), torch.bfloat16),
            "none": TensorSpec((0, 2), torch.float32),
        },
    )


def make_arena(n_units: int, slot_units: int = 4) -> Arena:
    return Arena(n_units * PAGE_BYTES, KV, slot_spec(slot_units), page_tokens=PAGE_TOKENS, poison=True)


class Owners:
    """Tables and slots, live ones and kept ones, with the values written to them."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.tables: list[tuple[PageTable, list[float]]] = []
        self.kept: list[tuple[PageTable, list[float]]] = []
        self.slots: list[tuple[int, float]] = []
        self.kept_slots: list[tuple[int, float]] = []
        self.stamp = 0.0
        arena.reclaim = self.reclaim

    def write_pages(self, table: PageTable, values: list[float], count: int) -> None:
        self.arena.extend(table, count)
        for unit in table.units[-count:].tolist() if count else []:
            self.stamp += 1
            self.arena.pages["k"][unit] = self.stamp
            self.arena.pages["v"][unit] = -self.stamp
            values.append(self.stamp)

    def write_slot(self, live: bool = True) -> None:
        slot = self.arena.allocate_slot(live)
        assert all(not pool[slot].any() for pool in self.arena.slots.values())
        self.stamp += 1
        for pool in self.arena.slots.values():
            pool[slot] = self.stamp % 256
        (self.slots if live else self.kept_slots).append((slot, self.stamp % 256))

    def share(self, source: PageTable, values: list[float], pages: int, live: bool) -> None:
        table = PageTable(live)
        self.arena.share(table, source, pages)
        (self.tables if live else self.kept).append((table, values[:pages]))

    def crowd(self, x: int) -> None:
        """Fills what is unused with tables of a page, shares every second page of all, and then lets go of some."""
        for _ in range(self.arena.unused_units):
            self.tables.append((PageTable(), []))
            self.write_pages(*self.tables[-1], 1)
        for place, (table, values) in enumerate(self.tables[x % 2 :: 2]):
            self.share(table, values, min(len(values), 1), live=place % 2 == 0)
        for place in range(len(self.tables) - 1, -1, -(x % 3 + 2)):
            self.arena.release(self.tables.pop(place)[0])

    def retire(self, place: int) -> None:
        self.kept.append(self.tables.pop(place))
        self.arena.retire(self.kept[-1][0])

    def reclaim(self, units: int) -> None:
        """Gives back the oldest that is not live: as much of a table as is wanted, a slot where no table is left."""
        if self.kept:
            table, values = self.kept[0]
            del values[max(len(values) - units, 0) :]
            self.arena.truncate(table, len(values))
            if not values:
                del self.kept[0]
        else:
            self.arena.free_slot(self.kept_slots.pop(0)[0])

    def release(self) -> None:
        for table, _ in self.tables + self.kept:
            self.arena.release(table)
        for slot, _ in self.slots + self.kept_slots:
            self.arena.free_slot(slot)

    def check(self) -> None:
        arena = self.arena
        # A stamp is a page, in however many tables.
        live = {value for _, values in self.tables for value in values}
        pages = live.union(*(values for _, values in self.kept))
        assert arena.kv_bytes == len(live) * PAGE_BYTES
        assert arena.state_bytes == len(self.slots) * arena.slot_units * PAGE_BYTES
        assert arena.free_units == arena.n_units - len(live) - len(self.slots) * arena.slot_units
        slots = self.slots + self.kept_slots
        assert arena.unused_units == arena.n_units - len(pages) - len(slots) * arena.slot_units
        kept = len(pages) - len(live) + len(self.kept_slots) * arena.slot_units
        assert arena.kept_bytes == kept * PAGE_BYTES
        for table, values in self.tables + self.kept:
            assert len(table) == len(values)
            for unit, value in zip(table.units.tolist(), values, strict=True):
                assert (arena.pages["k"][unit] == value).all() and (arena.pages["v"][unit] == -value).all()
            assert arena.live_pages([table], len(values)) == len(live.intersection(values))
        for slot, value in slots:
            assert all((pool[slot] == value).all() for pool in arena.slots.values())
        self.check_index()

    def check_index(self) -> None:
        """The arena knows of every block which tables hold how many of its units, and of no others."""
        if self.arena.slot_units == 1:
            return
        expected: dict[int, dict[PageTable, int]] = {}
        for table, _ in self.tables + self.kept:
            for unit in table.units.tolist():
                tables = expected.setdefault(unit // self.arena.slot_units, {})
                tables[table] = tables.get(table, 0) + 1
        assert self.arena._tables is not None and self.arena._tables._tables == expected


ACTIONS = [
    "new", "extend", "share", "share", "keep", "keep", "retire", "truncate", "release", "forget", "slot", "slot", "slot",
    "kept slot", "rest", "free", "convert", "crowd", "crowd",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    n_units=st.integers(1, 40),
    slot_units=st.integers(1, 7),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), min_size=10, max_size=60),
)
def test_any_sequence_keeps_data_and_bytes(n_units: int, slot_units: int, actions: list[tuple[str, int]]) -> None:
    arena = make_arena(n_units, slot_units)
    owners = Owners(arena)
    for action, x in actions:
        room = bool(arena.slots) and arena.free_units >= arena.slot_units
        if action == "new":
            owners.tables.append((PageTable(), []))
            owners.write_pages(*owners.tables[-1], min(x, arena.free_units))
        elif action == "crowd":
            owners.crowd(x)
        elif action == "extend" and owners.tables:
            owners.write_pages(*owners.tables[x % len(owners.tables)], min(x, arena.free_units))
        elif action in ("share", "keep") and owners.tables + owners.kept:
            table, values = (owners.tables + owners.kept)[x % len(owners.tables + owners.kept)]
            owners.share(table, values, min(x, len(values)), action == "share")
        elif action == "retire" and owners.tables:
            owners.retire(x % len(owners.tables))
        elif action == "truncate" and owners.tables:
            table, values = owners.tables[x % len(owners.tables)]
            del values[x:]
            arena.truncate(table, x)
        elif action == "release" and owners.tables:
            arena.release(owners.tables.pop(x % len(owners.tables))[0])
        elif action == "forget" and owners.kept:
            arena.release(owners.kept.pop(x % len(owners.kept))[0])
        elif action in ("slot", "kept slot") and room:
            owners.write_slot(action == "slot")
        elif action == "rest" and owners.slots:
            owners.kept_slots.append(owners.slots.pop(x % len(owners.slots)))
            arena.set_slot_live(owners.kept_slots[-1][0], False)
        elif action == "free" and owners.slots:
            arena.free_slot(owners.slots.pop(x % len(owners.slots))[0])
        elif action == "convert" and owners.tables:
            table, _ = owners.tables.pop(x % len(owners.tables))
            arena.release(table)
            if arena.slots and arena.free_units >= arena.slot_units:
                owners.write_slot()
        owners.check()
    owners.release()
    assert arena.free_units == arena.unused_units == arena.n_units
    assert arena.kv_bytes == arena.state_bytes == arena.kept_bytes == 0


def test_scattered_free_units_become_a_slot() -> None:
    arena = make_arena(16)
    owners = Owners(arena)
    for _ in range(16):
        owners.tables.append((PageTable(), []))
        owners.write_pages(*owners.tables[-1], 1)
    for index in (13, 9, 5, 1):
        arena.release(owners.tables.pop(index)[0])
    owners.write_slot()
    owners.check()
    assert arena.free_units == 0


class WatchedTable(PageTable):
    """A table that takes down when somebody looks at its pages."""

    def __init__(self, looked_at: list[PageTable], live: bool = True) -> None:
        super().__init__(live)
        self.looked_at = looked_at

    @property
    def units(self) -> np.ndarray:
        self.looked_at.append(self)
        return super().units


@pytest.mark.parametrize("others", [0, 300])
def test_pages_that_move_are_told_to_their_tables_alone(others: int) -> None:
    """However many tables there are besides, long-lived ones and copies of them."""
    arena = make_arena(16 + 4 * others)
    looked_at: list[PageTable] = []
    for _ in range(others):
        table, copy = WatchedTable(looked_at), WatchedTable(looked_at, live=False)
        arena.extend(table, 4)
        arena.share(copy, table, 4)
    owners = [WatchedTable(looked_at) for _ in range(16)]
    for owner in owners:
        arena.extend(owner, 1)
    by_unit = sorted(owners, key=lambda owner: int(owner.units[0]))
    second = WatchedTable(looked_at)
    arena.share(second, by_unit[0], 1)
    for index in (1, 2, 6, 11):
        arena.release(by_unit[index])
    looked_at.clear()
    arena.allocate_slot()
    assert len(looked_at) == 3 and set(looked_at) == {by_unit[0], by_unit[3], second}
    assert second.units[0] == by_unit[0].units[0] != by_unit[3].units[0]


def test_units_behind_the_last_block_hold_pages() -> None:
    arena = make_arena(7)
    owners = Owners(arena)
    owners.tables.append((PageTable(), []))
    owners.write_pages(*owners.tables[0], 3)
    owners.write_slot()
    owners.check()
    assert arena.free_units == 0
    assert sorted(owners.tables[0][0].units.tolist()) == [4, 5, 6]


def test_freed_memory_is_poisoned() -> None:
    arena = make_arena(8)
    table = PageTable()
    arena.extend(table, 1)
    unit = int(table.units[0])
    arena.pages["k"][unit] = 1.0
    arena.release(table)
    slot = arena.allocate_slot()
    arena.free_slot(slot)
    assert arena.pages["k"][unit].isnan().all()
    assert arena.slots["states"][slot].isnan().all() and arena.slots["window"][slot].isnan().all()


def test_views_are_aligned_and_share_the_budget() -> None:
    arena = make_arena(8)
    for tensor in (*arena.pages.values(), *arena.slots.values()):
        assert tensor.data_ptr() % 64 == 0
        assert (tensor.stride(0) * tensor.element_size()) % 64 == 0
    assert arena.budget_bytes == 8 * PAGE_BYTES
    assert len({tensor.untyped_storage().data_ptr() for tensor in (*arena.pages.values(), arena.slots["states"])}) == 1


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    arena = make_arena(6)
    table = PageTable()
    arena.extend(table, 3)
    with pytest.raises(EngineError, match="a state slot"):
        arena.allocate_slot()
    with pytest.raises(EngineError, match=r"512 bytes wanted for KV pages, 384 of 768 are free"):
        arena.extend(table, 4)
    assert len(table) == 3 and arena.free_units == 3
    with pytest.raises(EngineError, match="not in use"):
        arena.free_slot(0)


def test_budget_below_one_page_has_no_room() -> None:
    arena = Arena(127, KV, slot_spec(3), page_tokens=PAGE_TOKENS)
    assert arena.n_units == arena.budget_bytes == 0
    with pytest.raises(EngineError, match="128 bytes wanted for KV pages, 0 of 0 are free"):
        arena.extend(PageTable(), 1)
    with pytest.raises(EngineError, match="a state slot"):
        arena.allocate_slot()


def test_arena_without_convertible_layers_has_no_slots() -> None:
    arena = Arena(1024, KV, page_tokens=PAGE_TOKENS)
    with pytest.raises(EngineError, match="without converted layers"):
        arena.allocate_slot()
