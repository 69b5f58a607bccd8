"""Divergence by pieces equals the plain formula, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsla.distill.logits import divergence, teacher_kl


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 300), (1, 256)])
def test_kl_and_its_gradient_match_autograd(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(12, 50, bias).double()
    student, teacher = torch.randn(2, *shape, 12, dtype=torch.float64)
    student.requires_grad_(True)
    expected = F.kl_div(
        head(student).log_softmax(-1).flatten(0, 1),
        head(teacher).log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    (gradient,) = torch.autograd.grad(3 * expected, student)
    found = teacher_kl(student, teacher, head)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * found, student)[0], gradient, rtol=1e-10, atol=1e-14)


def test_divergence_sums_kl_and_likelihood() -> None:
    torch.manual_seed(1)
    head = nn.Linear(12, 50).double()
    student, teacher = torch.randn(2, 2, 200, 12, dtype=torch.float64)
    targets = torch.randint(0, 50, (2, 200))
    kl, nll = divergence(student, teacher, targets, head)
    torch.testing.assert_close(kl, teacher_kl(student, teacher, head) * 400, rtol=1e-10, atol=0)
    torch.testing.assert_close(nll, F.cross_entropy(head(student).flatten(0, 1), targets.flatten(), reduction="sum"))
