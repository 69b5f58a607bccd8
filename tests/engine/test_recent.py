"""Latencies of the last seconds."""

from __future__ import annotations

from dsla.engine.recent import Recent


def test_quantile_of_the_window() -> None:
    recent = Recent(window_seconds=10.0)
    assert recent.quantile(0.0) is None
    for second in range(20):
        recent.add(float(second), float(second))
    assert recent.quantile(19.0, 1.0) == 19
    assert recent.quantile(19.0, 0.9) == 18
    assert recent.quantile(19.0, 0.0) == 9
    assert recent.quantile(28.5) == 19
    assert recent.quantile(30.0) is None


def test_a_clock_that_jumps_back_leaves_nothing_behind() -> None:
    recent = Recent(window_seconds=10.0)
    recent.add(1e6, 5.0)
    assert recent.quantile(3.0) is None
    recent.add(2.0, 1.0)
    assert recent.quantile(3.0) == 1


def test_only_the_latest_values_are_kept() -> None:
    recent = Recent(size=4)
    for value in (9.0, 1.0, 2.0, 3.0, 4.0):
        recent.add(0.0, value)
    assert recent.quantile(0.0, 1.0) == 4
