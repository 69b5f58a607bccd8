"""The status line of `dsla serve`: there on a terminal, nowhere else."""

from __future__ import annotations

import sys
from io import StringIO

import pytest
from rich.console import Console, Group

from dsla.cli.status_line import line, status_line
from dsla.engine import AsyncEngine, SamplingParams
from tests.server.tiny import tiny_engine


def test_line_says_how_the_engine_is() -> None:
    engine = tiny_engine()
    for level in (0, 3):
        engine.add_request([3, 4, 5], SamplingParams(max_tokens=40, ignore_eos=True), min_level=level)
    engine.step()
    engine.add_request([3, 4, 5], SamplingParams(max_tokens=4))
    text = line(engine.stats()).plain
    assert text.startswith("2 running, 1 waiting  level 1.5 of 3  ")
    assert "tokens/s read" in text and text.endswith(" of 8.0 MiB")
    engine.set_level(2)
    assert "level fixed at 2 of 3" in line(engine.stats()).plain


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_shown_on_a_terminal_only(terminal: bool) -> None:
    engine, file = AsyncEngine(tiny_engine()), StringIO()
    before = sys.stdout
    with status_line(engine, Console(file=file, force_terminal=terminal, width=100)):
        print("a message")  # noqa: T201
    engine.close()
    assert sys.stdout is before
    assert ("0 running, 0 waiting" in file.getvalue()) == terminal
    assert ("a message" in file.getvalue()) == terminal, "what is printed meanwhile stands above the line"
    if not terminal:
        assert file.getvalue() == ""


def test_a_narrow_terminal_cuts_it_off() -> None:
    console = Console(file=StringIO(), width=30, force_terminal=True, record=True)
    console.print(Group(line(tiny_engine().stats())))
    assert len(console.export_text().rstrip("\n").splitlines()) == 1
