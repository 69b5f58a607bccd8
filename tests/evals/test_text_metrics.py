"""Metrics against examples worked by hand."""

from __future__ import annotations

import pytest

from dsla.evals import text_metrics as metrics


@pytest.mark.parametrize(
    ("metric", "written", "answer", "expected"),
    [
        ("exact_match", " The Eiffel Tower.", "eiffel tower", 1.0),
        ("exact_match", "Eiffel Towers", "eiffel tower", 0.0),
        ("exact_match", "theatre", "atre", 0.0),
        # Shared: cat, sat; 3 words were written ("the" does not count), 4 expected.
        ("qa_f1", "the cat sat down", "A cat sat on mats", 2 * 2 / (3 + 4)),
        # A word counts as often as it is in both.
        ("qa_f1", "no no no", "no", 2 * 1 / (3 + 1)),
        ("qa_f1", "dog", "cat", 0.0),
        ("qa_f1", "", "cat", 0.0),
        ("qa_f1", "the", "a", 1.0),
        ("substring", "It was Johannes Gutenberg, in 1450.", "johannes gutenberg", 1.0),
        ("substring", "Gutenberg", "Johannes Gutenberg", 0.0),
        ("substring", "anything", "The", 0.0),
        ("substring", "is 6d-4f", "6d-4f", 1.0),
        # Longest common subsequence: the cat on (3 of 4 words each, stems alike).
        ("rouge_l", "the cats sat on", "the cat lies on", 0.75),
        # Of 2 written and 4 expected words the subsequence holds 2: precision 1, recall 1/2.
        ("rouge_l", "police kill", "police killed the gunman", 2 * 1 * 0.5 / 1.5),
        ("rouge_l", "", "word", 0.0),
        # To go from one to the other 1 character goes and 1 comes, of 8: 1 - 2 / 8.
        ("edit_sim", "abcd", "abxd", 0.75),
        ("edit_sim", "x = 1  \n", "x = 1", 1.0),
        ("edit_sim", "    x", "x", 1 - 4 / 6),
    ],
)
def test_metric(metric: str, written: str, answer: str, expected: float) -> None:
    assert getattr(metrics, metric)(written, answer) == pytest.approx(expected)


def test_first_label() -> None:
    labels = ["City", "Other location", "Other", "card_arrival"]
    assert metrics.first_label(" city\n", labels) == "City"
    assert metrics.first_label("Other location, I think", labels) == "Other location"
    assert metrics.first_label("Otherwise", labels) == "Other"
    assert metrics.first_label("The city", labels) is None
    assert metrics.first_label("", labels) is None
