"""What a converted layer is trained for: the output of the softmax attention it replaces, on the same input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsla.convert.surgery import ConvertedAttention, project
from dsla.distill import parallel
from dsla.mixers import DslaMixer

_TINY = 1e-20


def teacher_output(teacher: nn.Module, x: Tensor, position: tuple[Tensor, Tensor]) -> Tensor:
    """The softmax attention's output `[B, T, hidden]` on the layer's normalised input `x`."""
    with torch.no_grad():
        return teacher(hidden_states=x, position_embeddings=position, attention_mask=None)[0]  # type: ignore[no-any-return]


def layer_loss(
    attention: ConvertedAttention, x: Tensor, target: Tensor, position: tuple[Tensor, Tensor], contrast: float
) -> tuple[Tensor, Tensor]:
    """Loss of one layer: relative squared error of its output, plus the gate-contrast term (Ro et al., section 3).

    Where several processes train, sums go over the rows of all of them.

    Args:
        attention: the layer being trained.
        x: its normalised input `[B, T, hidden]`.
        target: `teacher_output` of the same input.
        position: cos and sin of the rotary embedding.
        contrast: weight of the gate-contrast term.

    Returns:
        The loss, and the relative squared error alone; fp32 scalars.
    """
    q, k, v = project(attention, x, position)
    y, _ = attention.mixer.prefill(x, q, k, v)
    found, expected = attention.output(y).float(), target.float()
    squares = torch.stack([(found - expected).square().sum(), expected.square().sum()])
    wrong, scale = parallel.total(squares).unbind()
    error = wrong / scale.clamp_min(_TINY)
    if not contrast or attention.mixer.config.n_states == 1:
        return error, error
    return error + contrast * gate_similarity(attention.mixer, x, k), error


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Squared error relative to the square of what was expected, fp32 scalar."""
    expected = expected.float()
    return (found.float() - expected).square().sum() / expected.square().sum().clamp_min(_TINY)


def gate_similarity(mixer: DslaMixer, x: Tensor, k: Tensor) -> Tensor:
    """Mean cosine similarity of the history and the recency gate over tokens, per KV head and channel; fp32 scalar."""
    gates = mixer.gates(k if mixer.config.gate_source == "key" else x).exp().flatten(0, 1)
    history, recency = gates[:, 0], gates[:, -1]
    sums = torch.stack([(a * b).sum(0) for a, b in ((history, recency), (history, history), (recency, recency))])
    together, of_history, of_recency = parallel.total(sums).unbind()
    return (together / (of_history * of_recency).sqrt().clamp_min(_TINY)).mean()
