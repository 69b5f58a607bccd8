"""What a request may ask of sampling, and its random numbers."""

from __future__ import annotations

import numpy as np
import pytest

from dsla.engine.sampling import SamplingParams, derive_seed, uniform
from dsla.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.0), ("seed", 2**63), ("min_tokens", -1),
        ("min_tokens", 17), ("presence_penalty", 2.1), ("presence_penalty", float("nan")), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", float("inf")),
        ("repetition_penalty", float("nan")), ("logit_bias", {3: 100.5}), ("logit_bias", {3: float("nan")}),
        ("logprobs", -1), ("logprobs", 21),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert error.value.param == name


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 16}, {"min_tokens": 99, "max_tokens": None}, {"presence_penalty": -2.0},
        {"frequency_penalty": 2.0}, {"repetition_penalty": 0.5}, {"logit_bias": {0: -100, 5: 100.0}}, {"logprobs": 0},
        {"logprobs": 20},
    ],
    ids=str,
)  # fmt: skip
def test_limits_belong_to_the_range(params: dict[str, object]) -> None:
    assert hash(SamplingParams(**params)) == hash(SamplingParams(**params))  # type: ignore[arg-type]


def test_random_numbers_need_seed_and_place_only() -> None:
    once = [uniform(9, i) for i in range(50)]
    assert once == [uniform(9, i) for i in reversed(range(50))][::-1]
    assert len({*once, *(uniform(10, i) for i in range(50)), *(uniform(-1, i) for i in range(50))}) == 150
    assert all(0 <= number < 1 for number in once)


def test_random_numbers_are_uniform() -> None:
    n, cells = 8000, 20
    counts = np.bincount([int(uniform(i % 7, i) * cells) for i in range(n)], minlength=cells)
    statistic = float(((counts - n / cells) ** 2 / (n / cells)).sum())
    # Chi-square with cells - 1 degrees of freedom: mean, and five standard deviations.
    assert statistic < (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_seeds_of_several_answers_differ(seed: int) -> None:
    seeds = [derive_seed(seed, index) for index in range(100)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 100
    assert seeds == [derive_seed(seed, index) for index in range(100)]
    assert not set(seeds) & {derive_seed(seed ^ 1, index) for index in range(100)}
    assert all(SamplingParams(seed=derived).seed == derived for derived in seeds)
