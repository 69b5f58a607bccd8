"""Figures of replayed requests, against timings written by hand."""

from __future__ import annotations

import pytest

from dsla.bench.goodput import Objectives, Outcome, summary

QUICK = Outcome("done", 100, 5, due=1.0, sent=1.0, ended=3.0, arrivals=(1.5, 2.0, 2.25, 2.5, 3.0), output_tokens=5)
SLOW = Outcome(
    "done", 50, 2, due=2.0, sent=2.25, ended=6.0, arrivals=(4.0, 6.0), output_tokens=2, cached_tokens=25, level=3
)
SINGLE = Outcome("done", 10, 3, due=3.0, sent=3.0, ended=3.5, arrivals=(3.5,), output_tokens=1)
REJECTED = Outcome("rejected", 10, 1, due=4.0, sent=4.0, ended=4.5, error="429: full")
FAILED = Outcome("failed", 10, 4, due=4.0, sent=4.0, ended=11.0, arrivals=(5.0,), output_tokens=1, error="cut")
ALL = (QUICK, SLOW, SINGLE, REJECTED, FAILED)


def test_latencies_of_a_request() -> None:
    assert (QUICK.ttft, QUICK.e2e, QUICK.tpot, QUICK.normalised) == (0.5, 2.0, 0.375, 0.4)
    assert QUICK.gaps == [0.5, 0.25, 0.25, 0.5]
    # Measured from when it was due: a client that sends late does not make a server look fast.
    assert SLOW.ttft == 2.0
    assert SINGLE.tpot is None


def test_pieces_of_several_tokens_count_as_the_server_counts_them() -> None:
    outcome = Outcome("done", 1, 9, due=0.0, sent=0.0, ended=3.0, arrivals=(1.0, 3.0), output_tokens=9)
    assert (outcome.tpot, outcome.gaps, outcome.normalised) == (0.25, [2.0], pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("objectives", "met"),
    [
        (Objectives(), [True, True, True, False, False]),
        (Objectives(ttft=0.5), [True, False, True, False, False]),
        (Objectives(tpot=0.375), [True, False, True, False, False]),
        (Objectives(ttft=2.0, tpot=0.3), [False, False, True, False, False]),
        (Objectives(ttft=0.1, tpot=9.0), [False] * 5),
    ],
)
def test_goodput_counts_what_meets_both_objectives(objectives: Objectives, met: list[bool]) -> None:
    assert [outcome.meets(objectives) for outcome in ALL] == met
    found = summary(ALL, objectives)
    assert found["met"] == sum(met)
    # From the first arrival at 1 to the last end at 11.
    assert found["seconds"] == 10.0
    assert found["goodput"] == pytest.approx(sum(met) / 10)


def test_summary_of_a_run() -> None:
    found = summary(ALL, Objectives())
    counts = {name: found[name] for name in ("requests", "done", "rejected", "failed", "cancelled", "short")}
    assert counts == {"requests": 5, "done": 3, "rejected": 1, "failed": 1, "cancelled": 0, "short": 1}
    assert found["output_tokens_per_second"] == pytest.approx(0.8)
    assert found["prompt_tokens_per_second"] == pytest.approx(16.0)
    assert found["ttft"]["p50"] == 0.5 and found["ttft"]["mean"] == pytest.approx(1.0)
    assert found["tpot"]["p50"] == pytest.approx((0.375 + 2.0) / 2)
    assert found["itl"]["p50"] == 0.5 and found["itl"]["p99"] <= 2.0
    assert found["client_lag"] == 0.25
    assert (found["mean_level"], found["cached_share"]) == (3.0, pytest.approx(25 / 160))


def test_summary_without_an_answer() -> None:
    found = summary([REJECTED], Objectives(1.0, 1.0))
    assert (found["goodput"], found["ttft"], found["mean_level"]) == (0.0, None, None)


def test_record_of_a_request_is_plain() -> None:
    data = QUICK.record()
    assert data["itl"] == QUICK.gaps and data["normalised"] == QUICK.normalised
    assert "arrivals" not in data and "error" not in data
    assert FAILED.record()["error"] == "cut" and "ttft" not in FAILED.record()
