"""Choosing a token."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dsla.engine.sampling import SamplingParams, sample
from dsla.errors import RequestError

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.5]).log_softmax(0)


def draws(n: int = 4000, logits: torch.Tensor = LOGITS, **params: float) -> Counter[int]:
    chosen = SamplingParams(**{"temperature": 1.0, **params})  # type: ignore[arg-type]
    return Counter(sample(logits, chosen, 3, i) for i in range(n))


def test_zero_temperature_takes_the_most_likely() -> None:
    assert sample(LOGITS, SamplingParams(), 0, 0) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_probabilities(temperature: float) -> None:
    counts = draws(temperature=temperature)
    expected = (LOGITS / temperature).softmax(0)
    for token, probability in enumerate(expected.tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.7}, {1, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),
    ],
    ids=str,
)
def test_only_allowed_tokens_are_drawn(params: dict[str, float], allowed: set[int]) -> None:
    assert set(draws(800, **params)) == allowed


def test_a_draw_needs_seed_and_place_only() -> None:
    params = SamplingParams(temperature=1.0)
    once = [sample(LOGITS, params, 9, i) for i in range(50)]
    assert once == [sample(LOGITS, params, 9, i) for i in reversed(range(50))][::-1]
    assert once != [sample(LOGITS, params, 10, i) for i in range(50)]
    assert sample(LOGITS, params, -1, 0) in range(5)


def test_tiny_temperature_does_not_overflow() -> None:
    assert set(draws(20, LOGITS.bfloat16(), temperature=1e-30)) == {1}
    assert set(draws(20, 1000 + LOGITS, temperature=1e-307)) == {1}
    assert set(draws(20, LOGITS, temperature=5e-324)) == {1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.0), ("seed", 2**63),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert error.value.param == name
