"""The number of threads is measured, among those that this process may use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsla.engine import threads
from dsla.engine.threads import best_threads, bounds, fastest
from tests.engine.tiny import tiny_decoder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical cores, four physical ones, no quota."""
    for i in range(8):
        folder = tmp_path / f"cpu{i}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{i % 4},{i % 4 + 4}\n")
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_usable", lambda: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def test_candidates_are_one_physical_and_logical_cores(machine: Path) -> None:
    assert bounds().candidates == (1, 4, 8)


@pytest.mark.parametrize(("usable", "found"), [({0, 4}, (1, 2)), ({0, 1, 2}, (1, 3)), ({5}, (1,))], ids=str)
def test_affinity_is_respected(
    machine: Path, monkeypatch: pytest.MonkeyPatch, usable: set[int], found: tuple[int, ...]
) -> None:
    monkeypatch.setattr(threads, "_usable", lambda: usable)
    assert bounds().candidates == found


@pytest.mark.parametrize(
    ("variable", "found"), [("1", (1,)), ("3", (1, 3)), ("6,2", (1, 4, 6)), ("99", (1, 4, 8)), ("x", (1, 4, 8))]
)
def test_omp_num_threads_bounds(
    machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str, found: tuple[int, ...]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert bounds().candidates == found


@pytest.mark.parametrize(
    ("quota", "found"),
    [("max 100000", (1, 4, 8)), ("150000 100000", (1, 2)), ("20000 100000", (1,)), ("600000 100000", (1, 4, 6))],
)
def test_the_quota_of_a_container_bounds(machine: Path, quota: str, found: tuple[int, ...]) -> None:
    (machine / "cpu.max").write_text(quota + "\n")
    assert bounds().candidates == found


def test_without_topology_every_core_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_TOPOLOGY", machine / "none")
    assert bounds().candidates == (1, 8)


def test_the_fastest_wins_and_noise_does_not() -> None:
    assert fastest({1: 4.0, 4: 1.0, 8: 1.3}) == 4
    assert fastest({1: 4.0, 4: 1.05, 8: 1.0}) == 4
    assert fastest({1: 4.0, 4: 1.5, 8: 1.0}) == 8


def test_measured_once_and_threads_are_left_as_they_were(
    empty_cache: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_usable", lambda: {0, 1})
    before = torch.get_num_threads()
    found = best_threads(tiny_decoder())
    assert found in (1, 2)
    assert torch.get_num_threads() == before
    monkeypatch.setattr(threads, "_measure", lambda decoder, numbers: pytest.fail("measured again"))
    assert best_threads(tiny_decoder()) == found


@pytest.mark.parametrize("text", ["", '{"measured": 64}', '{"measured": true}', '{"measured": "2"}'])
def test_a_damaged_file_is_measured_anew(
    empty_cache: Path, machine: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(threads, "_measure", lambda decoder, numbers: 4)
    best_threads(tiny_decoder())
    (file,) = (empty_cache / "measured").glob("threads-*.json")
    file.write_text(text)
    assert best_threads(tiny_decoder()) == 4


def test_one_candidate_needs_no_measuring(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_usable", lambda: {3})
    monkeypatch.setattr(threads, "_measure", lambda decoder, numbers: pytest.fail("measured"))
    assert best_threads(tiny_decoder()) == 1


def test_bounds_say_what_they_are(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "cpu.max").write_text("250000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert bounds() == threads.Bounds(logical=8, physical=4, variable=5, quota=3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list a process's threads")
def test_helpers_of_a_thread_that_computes_no_more_end() -> None:
    """In a process in which nobody else starts or ends threads."""
    code = """
import os, time, torch
from dsla.engine.threads import release_threads
def count(wanted):
    end = time.monotonic() + 10
    while (found := len(os.listdir("/proc/self/task"))) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return found
release_threads()
torch.set_num_threads(3)
alone = len(os.listdir("/proc/self/task"))
for _ in range(2):
    assert float(torch.ones(1 << 20).exp().sum()) > 0
    assert count(alone + 2) == alone + 2
    release_threads()
    assert count(alone) == alone
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
