"""Divergence of two models' next-token distributions, without ever holding the logits of more than a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_TOKENS_AT_ONCE = 256


def teacher_kl(student: Tensor, teacher: Tensor, head: nn.Linear) -> Tensor:
    """KL(teacher || student) of the next-token distributions, averaged over tokens; differentiable in `student`.

    Logits are made in the head's dtype for a few tokens at a time and compared in fp32; their gradient is folded into that
    of `student` at once, so memory does not grow with tokens times vocabulary.

    Args:
        student: hidden states after the final norm `[..., hidden]`.
        teacher: the same of the teacher, same shape.
        head: the output head both share.

    Returns:
        Nats, fp32 scalar (fp64 in an fp64 model).
    """
    kl: Tensor = _TeacherKl.apply(student.flatten(0, -2), teacher.flatten(0, -2), head.weight, head.bias)
    return kl


class _TeacherKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total, gradients = student.new_zeros((), dtype=dtype), []
        for ours, theirs in zip(student.split(_TOKENS_AT_ONCE), teacher.split(_TOKENS_AT_ONCE), strict=True):
            expected = nn.functional.linear(theirs, weight, bias).to(dtype).log_softmax(-1)
            found = nn.functional.linear(ours, weight, bias).to(dtype).log_softmax(-1)
            p = expected.exp()
            total += torch.dot(p.flatten(), expected.sub_(found).flatten())
            if ctx.needs_input_grad[0]:
                gradients.append(found.exp_().sub_(p).to(weight.dtype) @ weight)
        count = len(student)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients) / count)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


@torch.no_grad()
def divergence(student: Tensor, teacher: Tensor, targets: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and the student's negative log-likelihood, both summed over tokens.

    Args:
        student: hidden states after the final norm `[B, T, hidden]`.
        teacher: the same of the teacher.
        targets: the tokens that followed `[B, T]` int64.
        head: the output head both share.

    Returns:
        Nats, two fp32 scalars (fp64 in an fp64 model).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    kl, nll = torch.zeros(2, dtype=dtype, device=student.device)
    pieces = (x.flatten(0, 1).split(_TOKENS_AT_ONCE) for x in (student, teacher, targets))
    for ours, theirs, following in zip(*pieces, strict=True):
        expected = nn.functional.linear(theirs, head.weight, head.bias).to(dtype).log_softmax(-1)
        found = nn.functional.linear(ours, head.weight, head.bias).to(dtype).log_softmax(-1)
        nll -= found.gather(1, following.unsqueeze(1)).sum()
        kl += torch.dot(expected.exp().flatten(), (expected - found).flatten())
    return kl, nll
