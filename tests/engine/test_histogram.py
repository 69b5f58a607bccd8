"""Counts of values between bounds."""

from __future__ import annotations

import pytest

from dsla.engine.histogram import Histogram


def test_a_value_counts_under_the_first_bound_it_does_not_exceed() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0, 0.5, 1, 1.5, 2, 5, 5.1, 100):
        histogram.add(value)
    found = histogram.summary()
    assert found["bounds"] == [1, 2, 5]
    assert found["counts"] == [3, 2, 1, 2]
    assert found["sum"] == pytest.approx(115.1)
