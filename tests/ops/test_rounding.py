"""Rounding of states to bfloat16: right on average, exact where it can be, a function of position and element."""

from __future__ import annotations

import torch

from dsla.ops.rounding import rounded


def test_the_mean_over_positions_is_the_value() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 13)
    kept = rounded(x.expand(4096, 7, 13).contiguous(), torch.bfloat16, torch.arange(4096))
    unit = 2.0 ** (x.abs().log2().floor() - 7)
    assert ((kept.double().mean(0) - x).abs() < 0.002 * unit).all()
    assert ((kept.float() - x).abs() < unit).all()


def test_what_fits_is_kept_and_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([[0.0, -0.0, 1.5, -3.0, 2.0**-130, torch.inf, -torch.inf, torch.nan]])
    for position in range(50):
        kept = rounded(x, torch.bfloat16, torch.tensor([position]))
        torch.testing.assert_close(kept.float(), x, rtol=0, atol=0, equal_nan=True)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, positions = torch.randn(5, 3, 4), torch.tensor([7, 0, 7, 1 << 20, 3])
    kept = rounded(x, torch.bfloat16, positions)
    alone = [rounded(x[i : i + 1], torch.bfloat16, positions[i : i + 1]) for i in range(5)]
    assert torch.equal(kept, torch.cat(alone))


def test_a_slow_sum_grows_to_what_it_should() -> None:
    gate, total, exact = 1 - 2**-11, torch.zeros(1, 500), 0.0
    for position in range(1, 8001):
        total = rounded(total * gate + 0.3, torch.bfloat16, torch.tensor([position])).float()
        exact = exact * gate + 0.3
        if position in (1000, 2000, 4000, 8000):
            assert float((total - exact).square().mean().sqrt()) < 0.06 * exact
            assert abs(float(total.mean()) - exact) < 0.01 * exact


def test_other_dtypes_are_rounded_to_the_nearest() -> None:
    x = torch.randn(2, 9, dtype=torch.float64)
    assert torch.equal(rounded(x, torch.float64, torch.tensor([1, 2])), x)
    assert torch.equal(rounded(x, torch.float32, torch.tensor([1, 2])), x.float())
