"""The measurements of `benchmarks/engine_bars.py`, on a tiny model: what is run is what is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.tiny import tiny_decoder


@pytest.fixture
def bars(benchmark_module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = benchmark_module("engine_bars")
    monkeypatch.setattr(module, "LEVELS", (0, 3))
    monkeypatch.setattr(module, "CONVERTED", 2)
    monkeypatch.setattr(module, "load_or_measure", lambda decoder: None)
    return module


def test_equal_bytes_holds_as_many_as_fit(bars: Any) -> None:
    found = bars.equal_bytes(tiny_decoder(), 300, 2)
    assert found["requests"][0] == bars.HOLDERS < found["requests"][3]
    assert found["request_ratio"] == found["requests"][3] / bars.HOLDERS
    for level, requests in found["requests"].items():
        assert 0.5 * found["budget_bytes"] < found["used_bytes"][level] <= found["budget_bytes"]
        assert len(found["step_seconds"][level]) == 2 + bars.WARM_UP
        assert found["tokens_per_second"][level] > 0 and requests >= 1


def test_conversion_is_timed_beside_prefill(bars: Any) -> None:
    found = bars.conversion(tiny_decoder(), 200, 2)
    assert found["layers"] == 2
    assert len(found["prefill_seconds"]) == len(found["conversion_seconds"]) == 2
    assert all(longest > 0 for longest in found["longest_step_seconds"])
    assert all(steps >= 1 for steps in found["conversion_steps"])


def test_second_turns_compute_what_is_new(bars: Any) -> None:
    found = bars.second_turn(tiny_decoder(), 400, 2)
    assert set(found["levels"]) == {0, 3}
    for level in found["levels"].values():
        assert all(computed <= bars.TURN + 3 for computed in level["computed_tokens"])
        assert len(level["cold_seconds"]) == len(level["second_turn_seconds"]) == 2


def test_levels_are_timed_against_level_0(bars: Any) -> None:
    found = bars.against_level_0(tiny_decoder(), 64, 2)
    assert set(found["decode_seconds"]) == set(found["prefill_seconds"]) == {0, 3}
    assert found["decode_ratio"] > 0 and found["prefill_ratio"] > 0


def test_requests_that_do_not_fit_are_not_measured(bars: Any) -> None:
    decoder = tiny_decoder()
    run = bars.Measured(decoder, decoder.arena(1 << 20).page_bytes * 4 * 30, 0, 64)
    for prompt in bars.prompts(decoder, 2, 300):
        run.add(prompt, 20)
    with pytest.raises(RuntimeError, match="1 requests do not fit"):
        run.read_all()
