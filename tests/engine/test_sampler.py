"""Every choice against a plain NumPy reference in fp64, alone and in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsla.engine.request import Request
from dsla.engine.sampler import Choice, choose
from dsla.engine.sampling import SamplingParams, uniform

END = 2


def request(params: SamplingParams, output: list[int] | None = None, prompt: list[int] | None = None) -> Request:
    return Request(
        id="r", prompt=prompt or [1], params=params, max_tokens=99, min_level=0, max_level=0, output=list(output or []),
        seed=params.seed or 0, end_tokens=frozenset({END}),
    )  # fmt: skip


def reference_logits(row: NDArray[Any], asked: Request) -> NDArray[Any]:
    """The edited logits, token by token."""
    params, output = asked.params, asked.output
    edited = row.astype(np.float64).copy()
    for token in range(len(edited)):
        if token in asked.prompt or token in output:
            factor = params.repetition_penalty
            edited[token] = edited[token] / factor if edited[token] > 0 else edited[token] * factor
        edited[token] -= params.frequency_penalty * output.count(token)
        edited[token] -= params.presence_penalty if token in output else 0
        edited[token] += params.logit_bias.get(token, 0)
        if token in asked.end_tokens and len(output) < params.min_tokens:
            edited[token] = -np.inf
    return edited


def reference_probabilities(row: NDArray[Any], asked: Request) -> NDArray[Any]:
    """The distribution that is drawn from: edits, temperature, top-k, top-p, min-p, one after the other."""
    params, edited = asked.params, reference_logits(row, asked)
    order = np.argsort(-edited, kind="stable")
    if params.temperature == 0:
        return np.eye(len(row))[order[0]]
    if params.top_k:
        edited[order[params.top_k :]] = -np.inf
    scaled = np.exp((edited - edited.max()) / params.temperature)
    left = scaled / scaled.sum()
    if params.top_p < 1:
        total = 0.0
        for token in order:
            left[token], total = (left[token], total + left[token]) if total < params.top_p else (0.0, total)
    left[left < params.min_p * left.max()] = 0
    return left / left.sum()


def logits_of(seed: int, vocab: int, spread: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(vocab, generator=generator)).to(dtype)


def asked_for(draw: st.DrawFn) -> SamplingParams:
    pick = st.sampled_from
    return SamplingParams(
        temperature=draw(pick([0.0, 0.3, 1.0, 2.0])), top_p=draw(pick([1.0, 0.9, 0.5, 0.001])),
        top_k=draw(pick([0, 0, 1, 5, 40, 10**9])), min_p=draw(pick([0.0, 0.0, 0.05, 0.9])),
        presence_penalty=draw(pick([0.0, 0.0, 1.5, -2.0])), frequency_penalty=draw(pick([0.0, 0.0, 0.7])),
        repetition_penalty=draw(pick([1.0, 1.0, 1.3, 0.5])), logit_bias=draw(pick([{}, {}, {3: 5.0, 0: -100.0}])),
        min_tokens=draw(pick([0, 0, 4])), logprobs=draw(pick([None, None, 0, 3])), seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip


@st.composite
def rows(draw: st.DrawFn, vocab: int) -> tuple[torch.Tensor, Request]:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    logits = logits_of(draw(st.integers(0, 10**6)), vocab, draw(st.sampled_from([0.0, 0.1, 3.0, 30.0])), dtype)
    tokens = st.lists(st.integers(0, min(vocab, 12) - 1), max_size=9)
    return logits.float(), request(asked_for(draw), draw(tokens), draw(tokens))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_choice_is_the_reference_s(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([5, 61, 700]))
    logits, asked = data.draw(rows(vocab))
    (choice,) = choose(logits.unsqueeze(0), [asked])
    assert isinstance(choice, Choice)
    probabilities = reference_probabilities(logits.numpy(), asked)
    assert probabilities[choice.token] > 0
    if asked.params.top_k == 0 or asked.params.top_k >= vocab:
        # Drawn in the order of token ids: at most rounding lies between the draw and the token's part of [0, 1).
        end = probabilities[: choice.token + 1].sum()
        draw = uniform(asked.seed, len(asked.output)) if asked.params.temperature else end
        assert end - probabilities[choice.token] - 1e-9 <= draw <= end + 1e-9


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_rest_of_the_batch_changes_nothing(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([5, 61, 1023, 4099]))
    batch = data.draw(st.lists(rows(vocab), min_size=1, max_size=20))
    alone = [choose(logits.unsqueeze(0), [asked])[0] for logits, asked in batch]
    for _, asked in batch:
        asked.edits = None
    assert choose(torch.stack([logits for logits, _ in batch]), [asked for _, asked in batch]) == alone
    picked = data.draw(st.permutations(range(len(batch))))
    together = torch.stack([batch[i][0] for i in picked])
    assert choose(together, [batch[i][1] for i in picked]) == [alone[i] for i in picked]


@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_p": 0.9}, {"top_p": 0.5}, {"top_k": 4}, {"min_p": 0.1},
        {"top_k": 6, "top_p": 0.8}, {"top_p": 0.95, "min_p": 0.08}, {"presence_penalty": 1.0, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.8}, {"logit_bias": {0: 2.0, 3: -100}}, {"min_tokens": 9},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5, "frequency_penalty": -0.5},
    ],
    ids=str,
)  # fmt: skip
def test_draws_are_distributed_as_the_reference(params: dict[str, Any]) -> None:
    row, n = logits_of(1, 12, 1.0), 6000
    output = [4, 4, 7, 4, 0]
    asked = [request(SamplingParams(**{"temperature": 1.0, **params}, seed=seed), output, [5, 7]) for seed in range(n)]
    choices = choose(row.expand(n, -1), asked)
    counts = np.bincount([choice.token for choice in choices if choice], minlength=12)
    expected = n * reference_probabilities(row.numpy(), asked[0])
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    free = int(kept.sum()) - 1
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    # Chi-square with `free` degrees of freedom: mean, and five standard deviations.
    assert statistic <= free + 5 * (2 * free) ** 0.5


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_counts_grow_with_the_output_as_if_counted_anew(temperature: float) -> None:
    params = SamplingParams(
        max_tokens=80, temperature=temperature, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2
    )
    row, asked = logits_of(5, 50, 2.0), request(params, [], [9, 9, 3])
    for _ in range(80):
        (choice,) = choose(row.unsqueeze(0), [asked])
        assert isinstance(choice, Choice)
        assert choice.token == int(reference_logits(row.numpy(), asked).argmax())
        asked.output.append(choice.token)
    assert len(set(asked.output)) > 18


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_of_the_model_s_own_distribution(temperature: float) -> None:
    row = logits_of(3, 300, dtype=torch.bfloat16)
    params = SamplingParams(
        temperature=temperature, top_k=3, logit_bias={7: 100.0}, presence_penalty=2.0, logprobs=5, seed=4
    )
    (choice,) = choose(row.unsqueeze(0), [request(params, [8])])
    assert isinstance(choice, Choice) and choice.logprobs is not None
    exact = row.double().numpy()
    expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    own, *top = choice.logprobs
    assert own[0] == choice.token == 7
    assert [token for token, _ in top] == np.argsort(-exact, kind="stable")[:5].tolist()
    for token, logprob in choice.logprobs:
        assert logprob == pytest.approx(expected[token], abs=1e-12)


def test_without_a_wish_no_logprobs() -> None:
    plain, none, own = (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(logprobs=0))
    choices = choose(torch.stack([logits_of(0, 9)] * 3), [request(params) for params in (plain, none, own)])
    assert [choice and choice.logprobs and len(choice.logprobs) for choice in choices] == [None, None, 1]


def test_of_equal_tokens_the_lower_ids_come_first() -> None:
    row = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 3.0]])
    for params, allowed in (
        (SamplingParams(), {1}),
        (SamplingParams(temperature=1.0, top_k=2), {1, 2}),
        (SamplingParams(temperature=1.0, top_k=3), {1, 2, 4}),
        (SamplingParams(temperature=1.0, top_p=0.3), {1, 2}),
    ):
        asked = [request(params) for _ in range(200)]
        for seed, one in enumerate(asked):
            one.seed = seed
        found = {choice.token for choice in choose(row.expand(200, -1), asked) if choice}
        assert found == allowed
    (choice,) = choose(row, [request(SamplingParams(logprobs=3))])
    assert isinstance(choice, Choice) and choice.logprobs is not None
    assert [token for token, _ in choice.logprobs] == [1, 1, 2, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0, logprobs=2)], ids=["greedy", "drawn"]
)
def test_rows_that_are_not_finite_are_told_apart(bad: float, params: SamplingParams) -> None:
    logits = torch.stack([logits_of(i, 20) for i in range(3)])
    expected = choose(logits, [request(params) for _ in range(3)])
    logits[1, 13] = bad
    assert choose(logits, [request(params) for _ in range(3)]) == [expected[0], "logits are not finite", expected[2]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-307, 5e-324])
@pytest.mark.parametrize("top_k", [0, 3])
def test_tiny_temperatures_do_not_overflow(temperature: float, top_k: int) -> None:
    for row in (logits_of(1, 40, dtype=torch.bfloat16), 1000 + logits_of(1, 40, 200.0)):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=0.9)
        (choice,) = choose(row.unsqueeze(0), [request(params)])
        assert isinstance(choice, Choice) and choice.token == int(row.argmax())


def test_the_largest_random_number_still_draws_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsla.engine.sampler.uniform", lambda seed, index: 1 - 2.0**-53)
    for seed in range(50):
        row = torch.cat([logits_of(seed, 30), torch.tensor([-1e30])])
        (choice,) = choose(row.unsqueeze(0), [request(SamplingParams(temperature=1.0))])
        assert isinstance(choice, Choice) and choice.token == 29


def test_no_rows_no_choices() -> None:
    assert choose(torch.empty(0, 9), []) == []
