"""Every algorithm of the recurrence against the fp64 oracle: outputs, final states and gradients, for every split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsla.ops import LOG_GATE_FLOOR, chunk_dsla, fold_kv, naive_dsla, recurrent_dsla

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
GATES = ["scalar", "vector"]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what was expected."""
    expected = expected.double()
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return float((found.double() - expected).square().mean().sqrt() / scale) if expected.numel() else 0.0


def random_inputs(
    batch: int, tokens: int, gate: str, dtype: torch.dtype, *, states: int = 2, groups: int = 2, seed: int = 0,
    extreme: bool = False, width: int = 6, v_width: int = 5, share: int = 3,
) -> list[Tensor]:  # fmt: skip
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    log_g = -normal(batch, tokens, states, groups, width if gate == "vector" else 1).square() * 0.05
    log_g = log_g.clamp_min(LOG_GATE_FLOOR)
    if extreme:
        choice = torch.randint(0, 3, log_g.shape, generator=random)
        log_g = torch.where(choice == 0, 0.0, torch.where(choice == 1, LOG_GATE_FLOOR, log_g))
    tensors = [
        normal(batch, tokens, groups * share, width),
        normal(batch, tokens, groups, width),
        normal(batch, tokens, groups, v_width),
        log_g,
    ]
    return [x.to(dtype) for x in tensors]


def run_recurrent(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """`recurrent_dsla` token by token on scattered slots of a poisoned pool."""
    batch, tokens = q.shape[:2]
    shape = (log_g.shape[2], k.shape[2], k.shape[3], v.shape[3])
    slots = torch.arange(batch).flip(0) * 2 + 1
    pool = torch.full((2 * batch + 1, *shape), torch.nan, dtype=q.dtype)
    pool[slots] = torch.zeros(batch, *shape, dtype=q.dtype) if start is None else start.to(q.dtype)
    steps = [
        recurrent_dsla(q[:, t], k[:, t], v[:, t], log_g[:, t], pool, slots, torch.full((batch,), t + 1))
        for t in range(tokens)
    ]
    o = torch.stack(steps, 1) if steps else q.new_zeros(batch, 0, shape[0], q.shape[2], shape[3])
    assert pool[::2].isnan().all(), "rows that belong to nobody were written"
    return o, pool[slots]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("extreme", [False, True], ids=["mild", "extreme"])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 63, 64, 65, 200])
def test_chunk_and_recurrent_match_naive(tokens: int, extreme: bool, gate: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(2, tokens, gate, dtype, seed=tokens, extreme=extreme)
    start = torch.randn(2, 2, 2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected_o, expected_state = naive_dsla(*inputs, initial_state=start)
    for o, state in (chunk_dsla(*inputs, initial_state=start), run_recurrent(*inputs, start)):
        assert relative_error(o, expected_o) < TOLERANCE[dtype]
        assert relative_error(state, expected_state) < TOLERANCE[dtype]
    assert relative_error(fold_kv(*inputs[1:], initial_state=start), expected_state) < TOLERANCE[dtype]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("states", [1, 2, 4, 8])
def test_number_of_states(states: int, gate: str) -> None:
    inputs = random_inputs(1, 70, gate, torch.float64, states=states)
    expected, state = naive_dsla(*inputs)
    o, final = chunk_dsla(*inputs)
    assert o.shape == (1, 70, states, 6, 5)
    assert relative_error(o, expected) < 1e-10 and relative_error(final, state) < 1e-10


@pytest.mark.parametrize("gate", GATES)
def test_long_sequence(gate: str) -> None:
    inputs = random_inputs(1, 5000, gate, torch.float32, extreme=True, groups=1, share=1)
    expected, state = naive_dsla(*inputs)
    o, final = chunk_dsla(*inputs)
    assert relative_error(o, expected) < 1e-5 and relative_error(final, state) < 1e-5
    assert relative_error(fold_kv(*inputs[1:]), state) < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_hundred_thousand_tokens_stay_finite_and_fold_agrees(gate: str) -> None:
    inputs = random_inputs(1, 100_000, gate, torch.float32, groups=1, share=1, width=4, v_width=3)
    o, final = chunk_dsla(*inputs)
    assert o.isfinite().all()
    assert relative_error(fold_kv(*inputs[1:]), final) < 1e-5


@pytest.mark.parametrize("gate", GATES)
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5), cut=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_packed_split_and_folded_agree(gate: str, lengths: list[int], cut: float, seed: int) -> None:
    total = sum(lengths)
    inputs = random_inputs(1, total, gate, torch.float64, seed=seed, extreme=seed % 2 == 0)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    start = torch.randn(len(lengths), 2, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    o, final = chunk_dsla(*inputs, initial_state=start, cu_seqlens=bounds)
    expected, expected_final = naive_dsla(*inputs, initial_state=start, cu_seqlens=bounds)
    assert relative_error(o, expected) < 1e-10 and relative_error(final, expected_final) < 1e-10
    assert relative_error(fold_kv(*inputs[1:], initial_state=start, cu_seqlens=bounds), expected_final) < 1e-10

    for n, length in enumerate(lengths):
        alone = [x[:, bounds[n] : bounds[n + 1]] for x in inputs]
        head = int(cut * length)
        middle = fold_kv(*[x[:, :head] for x in alone[1:]], initial_state=start[n : n + 1])
        o_tail, state = chunk_dsla(*[x[:, head:] for x in alone], initial_state=middle)
        assert relative_error(o_tail, expected[:, bounds[n] + head : bounds[n + 1]]) < 1e-9
        assert relative_error(state, expected_final[n : n + 1]) < 1e-10


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [None, [70, 0, 1, 20]], ids=["dense", "packed"])
def test_gradients_match_naive(lengths: list[int] | None, gate: str) -> None:
    bounds = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    batch, tokens = (2, 75) if lengths is None else (1, 91)
    inputs = random_inputs(batch, tokens, gate, torch.float64, seed=3)
    start = torch.randn(batch if lengths is None else 4, 2, 2, 6, 5, dtype=torch.float64)
    gradients = []
    for op in (naive_dsla, chunk_dsla):
        leaves = [x.clone().requires_grad_() for x in (*inputs, start)]
        o, final = op(*leaves, cu_seqlens=bounds)
        weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)
        loss = (o * weight).sum() + final.square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for name, found, expected in zip(
        ["q", "k", "v", "log_g", "initial_state"], gradients[1], gradients[0], strict=True
    ):
        assert relative_error(found, expected) < 1e-10, name


@pytest.mark.parametrize("gate", GATES)
def test_fold_gradients_match_naive(gate: str) -> None:
    inputs = random_inputs(1, 40, gate, torch.float64, seed=5)
    gradients = []
    for fold in (lambda *x: naive_dsla(inputs[0], *x)[1], fold_kv):
        leaves = [x.clone().requires_grad_() for x in inputs[1:]]
        gradients.append(torch.autograd.grad(fold(*leaves).square().sum(), leaves))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, g: (q[:, :3], k, v, g), "q must be"),
        (lambda q, k, v, g: (q, k[..., 0], v, g), "k must be"),
        (lambda q, k, v, g: (q, k, v[:, :2], g), "k must be"),
        (lambda q, k, v, g: (q, k, v, g[..., :2]), "log_g must be"),
        (lambda q, k, v, g: (q[:, :, :5], k, v, g), "multiple of G"),
    ],
    ids=["short q", "flat k", "short v", "odd gate", "odd heads"],
)
@pytest.mark.parametrize("op", [naive_dsla, chunk_dsla])
def test_wrong_shapes_are_named(op, change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        op(*change(*random_inputs(1, 8, "vector", torch.float32)))


def test_wrong_bounds_states_and_gates_are_named() -> None:
    inputs = random_inputs(1, 8, "vector", torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        chunk_dsla(*inputs, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="initial_state must be"):
        chunk_dsla(*inputs, initial_state=torch.zeros(1, 2, 2, 6, 4))
    with pytest.raises(ValueError, match="vector log gates must be >= -1.2"):
        chunk_dsla(*inputs[:3], inputs[3] - 2)
    with pytest.raises(ValueError, match="pool must be"):
        recurrent_dsla(*[x[:, 0] for x in inputs], torch.zeros(3, 2, 2, 6, 4), torch.tensor([0]), torch.tensor([1]))
