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


def test_what_is_the_same_in_a_step_is_kept_once_and_counts_each_time() -> None:
    recent = Recent(size=3)
    for step in range(3):
        for _ in range(64):
            recent.add(float(step), 0.01)
    assert recent.quantile(2.0) == 0.01
    recent = Recent(size=3)
    for value, count in ((0.01, 88), (0.02, 3), (0.5, 9)):
        for _ in range(count):
            recent.add(1.0, value)
    assert (recent.quantile(1.0, 0.88), recent.quantile(1.0, 0.9), recent.quantile(1.0, 0.92)) == (0.01, 0.02, 0.5)


def test_only_what_began_since_counts() -> None:
    recent = Recent()
    recent.add(5.0, 4.0)
    recent.add(6.0, 0.5)
    assert recent.quantile(6.0, 1.0) == 4
    assert recent.quantile(6.0, 1.0, since=0.9) == 4
    assert recent.quantile(6.0, 1.0, since=1.0) == 0.5
    assert recent.quantile(6.0, 1.0, since=5.6) is None
