"""A tiny model with levels, its own object each time, and mixers whose weights matter."""

from __future__ import annotations

import copy

import torch

from dsla.convert import Plan, Teacher
from dsla.convert.surgery import Levels
from dsla.evals.subject import Subject
from dsla.families import attention_shape
from dsla.mixers import DslaConfig, DslaMixer
from tests.server.tiny import tiny_model, tiny_tokenizer

MIXER = DslaConfig(window=4, sinks=2, delta_rank=2)
ORDER = (2, 0, 3, 1)


def subject(dtype: torch.dtype = torch.float64) -> Subject:
    """All four layers can be converted."""
    model = copy.deepcopy(tiny_model()).to(dtype)
    torch.manual_seed(11)
    mixers = {}
    for layer in ORDER:
        mixer = DslaMixer(MIXER, attention_shape(model.config)).to(dtype).eval().requires_grad_(False)
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        mixers[layer] = mixer
    model.dsla = Levels(model, Plan(Teacher("tiny", "0" * 64, 4), ORDER, MIXER), mixers)
    return Subject(model, tiny_tokenizer())


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids, none of which ends a text."""
    return torch.randint(3, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
