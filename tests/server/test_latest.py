"""A few values that were of use last."""

from __future__ import annotations

from dsla.server.latest import Latest


def test_what_was_of_use_least_lately_goes() -> None:
    latest = Latest[str, int](2)
    latest.add("a", 1)
    latest.add("b", 2)
    assert (latest.get("a"), latest.get("x")) == (1, None)
    latest.add("c", 3)
    assert [latest.get(key) for key in "abc"] == [1, None, 3]
    latest.add("a", 4)
    latest.add("d", 5)
    assert [latest.get(key) for key in "acd"] == [4, None, 5]
