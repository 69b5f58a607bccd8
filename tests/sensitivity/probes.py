"""A probe of the tiny teacher."""

from __future__ import annotations

from typing import Any

import torch

from dsla.mixers import DslaConfig
from dsla.sensitivity import Probe
from tests.distill.tiny import teacher

TOKENS = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
CONFIG = DslaConfig(window=4, sinks=1, delta_rank=0)


def probe(**settings: Any) -> Probe:
    return Probe(**{"model": teacher(), "tokens": TOKENS, "config": CONFIG} | settings)


def silent(done: int, total: int) -> None:
    pass
