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
    """Live tables and slots with the values written to them."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.tables: list[tuple[PageTable, list[float]]] = []
        self.slots: list[tuple[int, float]] = []
        self.stamp = 0.0

    def write_pages(self, table: PageTable, values: list[float], count: int) -> None:
        self.arena.extend(table, count)
        for unit in table.units[-count:].tolist() if count else []:
            self.stamp += 1
            self.arena.pages["k"][unit] = self.stamp
            self.arena.pages["v"][unit] = -self.stamp
            values.append(self.stamp)

    def write_slot(self) -> None:
        slot = self.arena.allocate_slot()
        assert all(not pool[slot].any() for pool in self.arena.slots.values())
        self.stamp += 1
        for pool in self.arena.slots.values():
            pool[slot] = self.stamp % 256
        self.slots.append((slot, self.stamp % 256))

    def check(self) -> None:
        arena = self.arena
        pages = sum(len(values) for _, values in self.tables)
        assert arena.kv_bytes == pages * PAGE_BYTES
        assert arena.state_bytes == len(self.slots) * arena.slot_units * PAGE_BYTES
        assert arena.free_units == arena.n_units - pages - len(self.slots) * arena.slot_units
        for table, values in self.tables:
            assert len(table) == len(values)
            for unit, value in zip(table.units.tolist(), values, strict=True):
                assert (arena.pages["k"][unit] == value).all() and (arena.pages["v"][unit] == -value).all()
        for slot, value in self.slots:
            assert all((pool[slot] == value).all() for pool in arena.slots.values())


@settings(max_examples=150, deadline=None)
@given(
    n_units=st.integers(1, 40),
    slot_units=st.integers(1, 7),
    actions=st.lists(
        st.tuples(st.sampled_from(["extend", "new", "release", "slot", "free", "convert"]), st.integers(0, 9)),
        max_size=50,
    ),
)
def test_any_sequence_keeps_data_and_bytes(n_units: int, slot_units: int, actions: list[tuple[str, int]]) -> None:
    arena = make_arena(n_units, slot_units)
    owners = Owners(arena)
    for action, x in actions:
        if action == "new":
            owners.tables.append((PageTable(), []))
        elif action == "extend" and owners.tables:
            owners.write_pages(*owners.tables[x % len(owners.tables)], min(x, arena.free_units))
        elif action == "release" and owners.tables:
            arena.release(owners.tables.pop(x % len(owners.tables))[0])
        elif action == "slot" and arena.slots and arena.free_units >= arena.slot_units:
            owners.write_slot()
        elif action == "free" and owners.slots:
            arena.free_slot(owners.slots.pop(x % len(owners.slots))[0])
        elif action == "convert" and owners.tables:
            table, _ = owners.tables.pop(x % len(owners.tables))
            arena.release(table)
            if arena.free_units >= arena.slot_units:
                owners.write_slot()
        owners.check()
    for table, _ in owners.tables:
        arena.release(table)
    for slot, _ in owners.slots:
        arena.free_slot(slot)
    assert arena.free_units == arena.n_units
    assert arena.kv_bytes == arena.state_bytes == 0


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
