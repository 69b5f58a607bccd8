"""What a committed result says of its origin."""

from __future__ import annotations

import shlex
import sys

import pytest

from benchmarks.record import origin


@pytest.mark.parametrize("name", ["few", "it's one of a few"])
def test_a_result_of_a_test_tells_how_to_run_that_test(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c"])  # as in a process of pytest-xdist
    assert shlex.split(origin()["command"]) == ["pytest", "-m", "", request.node.nodeid]


def test_a_result_of_a_script_tells_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(sys, "argv", ["/home/me/levels.py", "--books", "/home/me/books.zst", "--seed", "1"])
    assert origin()["command"] == "levels.py --books books.zst --seed 1"
