"""Thousands of decode steps with states in bfloat16: the error is bounded, and does not grow with the text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsla.mixers import AttentionShape, DslaConfig, DslaMixer
from dsla.ops.cpu import bindings

SHAPE = AttentionShape(hidden_size=576, n_heads=9, n_kv_heads=3, head_dim=64)
LAST = 100


def drift(config: DslaConfig, half_lives: tuple[float, float], steps: int) -> Tensor:
    """Relative RMS error of the outputs against fp64, of every 100 steps."""
    torch.manual_seed(0)
    mixer = DslaMixer(config, SHAPE).requires_grad_(False)
    for weight in mixer.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    for state, half_life in enumerate(half_lives):
        log_gate = -math.log(2) / half_life * config.gate_temperature
        mixer.gates.bias[state] = log_gate - math.log(-math.expm1(log_gate))
    q, k, v = (1.5 * torch.randn(steps, heads, 64).bfloat16() for heads in (9, 3, 3))
    v, x = v + torch.randn(3, 64).bfloat16(), torch.zeros(steps, 576).bfloat16()
    pool = mixer.state_spec(torch.bfloat16, torch.bfloat16).zeros(1)
    slot = torch.tensor([0])
    y = torch.cat([mixer.step(x[[t]], q[[t]], k[[t]], v[[t]], pool, slot, torch.tensor([t])) for t in range(steps)])
    assert pool["states"].dtype is torch.bfloat16
    wide = [part.double().unsqueeze(0) for part in (x, q, k, v)]
    expected = mixer.double().prefill(*wide)[0][0]
    off, scale = ((part.double().square().flatten(1).sum(1).view(-1, LAST).sum(1)) for part in (y - expected, expected))
    return (off / scale).sqrt()


NEAR_AND_FAR, FAR = DslaConfig(), DslaConfig(window=0, sinks=0)


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
@pytest.mark.parametrize(("config", "bound"), [(NEAR_AND_FAR, 0.01), (FAR, 0.025)], ids=["default", "states only"])
def test_short_drift(config: DslaConfig, bound: float, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "pytorch":
        monkeypatch.setattr(bindings, "kernels", lambda: None)
    errors = drift(config, (100.0, 10.0), 800)
    assert errors.max() < bound
    assert errors[-3:].mean() < 1.3 * errors[2:5].mean()


@pytest.mark.parametrize(("config", "bound"), [(NEAR_AND_FAR, 0.016), (FAR, 0.025)], ids=["default", "states only"])
def test_drift_over_8000_steps(config: DslaConfig, bound: float) -> None:
    errors = drift(config, (4096.0, 64.0), 8000)
    at = {steps: float(errors[steps // LAST - 1]) for steps in (1000, 2000, 4000, 8000)}
    assert max(at.values()) < bound, at
    assert at[8000] < 1.5 * at[4000], at
