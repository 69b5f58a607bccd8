"""Progress of a conversion: lines where there is no terminal, bars where there is one, and the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dsla.cli import training
from dsla.cli.progress import ChainProgress
from dsla.cli.training import Bars, TimeLeft
from dsla.distill.chain import Progress


def show(events: list[tuple[float, Progress]], monkeypatch: pytest.MonkeyPatch, terminal: bool = False) -> str:
    """What is shown of events at the given seconds."""
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    with Bars(Console(file=out, force_terminal=terminal, width=150)) as bars:
        progress = ChainProgress(bars)
        for seconds, event in events:
            now[0] = seconds
            progress(event)
    return out.getvalue()


def test_a_line_every_30_seconds_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [(0.0, Progress("data", -1, 0, 4)), (10.0, Progress("inputs", 7, 0, 4, 10, 10, tokens=1000, seconds=10.0))]
    for step in range(1, 91):
        at = 10.0 + step
        events.append((at, Progress("train", 7, 0, 4, step, 90, error=0.25, tokens=step * 100, seconds=float(step))))
    events.append((100.0, Progress("done", 7, 1, 4, error=0.125, seconds=100.0)))
    events.append((131.0, Progress("inputs", 3, 1, 4, 1, 10, tokens=100, seconds=31.0)))
    assert show(events, monkeypatch).splitlines() == [
        "inputs, layer 7: 10 of 10  100 tokens/s  0 of 4 layers done",
        "train, layer 7: 30 of 90  100 tokens/s  error 0.2500  0 of 4 layers done  about 0:06:00 left",
        "train, layer 7: 60 of 90  100 tokens/s  error 0.2500  0 of 4 layers done  about 0:05:30 left",
        "train, layer 7: 90 of 90  100 tokens/s  error 0.2500  0 of 4 layers done  about 0:05:00 left",
        "layer   7  held-out error 0.1250  100 s",
        "inputs, layer 3: 1 of 10  3 tokens/s  1 of 4 layers done  about 0:04:29 left",
    ]


def test_a_resumed_layer_counts_its_own_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [(1.0, Progress("train", 7, 0, 1, 81, 90, error=0.25, tokens=100, seconds=2.0))]
    assert "81 of 90  50 tokens/s  error 0.2500  0 of 1 layers done  about 0:00:18 left" in show(events, monkeypatch)


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [(float(s), Progress("train", 7, 0, 2, s, 9, error=0.5, tokens=s, seconds=float(s))) for s in range(1, 9)]
    shown = show(events, monkeypatch, terminal=True)
    assert "train, layer 7" in shown and "8/9" in shown and "0/2" in shown
    assert "about 0:00:10 left" in shown


def test_time_left_follows_the_last_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    left, shown = TimeLeft(), []
    for done in range(1, 101):
        now[0] += 0.001 if done <= 50 else 6.0
        shown.append(left(done, 180))
    assert shown[0] == ""
    assert shown[99] == "about 0:08:00 left", "parts found done already do not count"
