"""Scores of layers; a low score means: convert this one first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla.convert.surgery import ConvertedAttention, project
from dsla.distill.activations import Activations
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer

OnProgress = Callable[[int, int], None]
_ENTROPY_QUERIES = 32
_KL_STRIDE = 4


@torch.no_grad()
def attention_entropy(model: Any, tokens: Tensor, config: DslaConfig, on_progress: OnProgress) -> list[float]:
    """Entropy of the teacher's attention rows in nats, averaged over heads, windows and late queries (Ro et al., section 3).

    The paper takes the final query of one prompt; rows of the second half of every window make it less noisy.

    Args:
        model: the teacher.
        tokens: windows `[n, T]`.
        config: not read; metrics share one signature.
        on_progress: called with (layers done, layers in all).

    Returns:
        A score for each layer.
    """
    family, shape = family_of(model.config), attention_shape(model.config)
    layers, activations = model.get_submodule(family.layers), Activations(model, tokens, 1)
    length = tokens.shape[1]
    rows = torch.linspace(length // 2, length - 1, min(_ENTROPY_QUERIES, length - length // 2)).long()
    plain = DslaConfig(delta_rank=0)
    scores = []
    for i, layer in enumerate(layers):
        mixer = DslaMixer(plain, shape).to(activations.device)
        attention = ConvertedAttention(getattr(layer, family.attention), mixer, family)
        norm, entropies = layer.get_submodule(family.attention_norm), []
        for x in activations.at(i):
            q, k, _ = project(attention, norm(x.unsqueeze(0).to(activations.device)), activations.position)
            q = q[0, rows].float().unflatten(1, (shape.n_kv_heads, -1)) * shape.head_dim**-0.5
            logits = torch.einsum("tgrd,ngd->tgrn", q, k[0].float())
            future = torch.arange(length) > rows.view(-1, 1)
            log_p = logits.masked_fill(future[:, None, None].to(logits.device), -torch.inf).log_softmax(-1)
            entropies.append(float(-(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1).mean()))
        scores.append(sum(entropies) / len(entropies))
        on_progress(i + 1, len(layers))
    return scores


@torch.no_grad()
def measured_kl(model: Any, tokens: Tensor, config: DslaConfig, on_progress: OnProgress) -> list[float]:
    """KL(teacher || teacher with one layer converted) of the next-token distributions in nats, for each layer in turn.

    The converted layer is untrained and its states are off: window and sinks alone. It so measures what the layer reads from
    beyond them, and needs no training.

    Args:
        model: the teacher.
        tokens: windows `[n, T]`.
        config: mixer settings; window and sinks matter.
        on_progress: called with (layers done, layers in all).

    Returns:
        A score for each layer.
    """
    family, shape = family_of(model.config), attention_shape(model.config)
    layers, activations = model.get_submodule(family.layers), Activations(model, tokens, 1)
    norm, head = model.get_submodule(family.norm), model.get_submodule(family.head)

    def log_probabilities(hidden: Tensor, start: int) -> Tensor:
        for layer in layers[start:]:
            hidden = layer(hidden, position_embeddings=activations.position, attention_mask=None)
        return head(norm(hidden[:, ::_KL_STRIDE])).float().log_softmax(-1)  # type: ignore[no-any-return]

    teacher = [
        log_probabilities(x.unsqueeze(0).to(activations.device), len(layers)) for x in activations.at(len(layers))
    ]
    scores = []
    for i, layer in enumerate(layers):
        softmax = getattr(layer, family.attention)
        mixer = DslaMixer(config, shape).to(activations.device, next(model.parameters()).dtype)
        mixer.states_off = True
        inputs = activations.at(i)
        setattr(layer, family.attention, ConvertedAttention(softmax, mixer, family))
        divergences = []
        for x, expected in zip(inputs, teacher, strict=True):
            found = log_probabilities(x.unsqueeze(0).to(activations.device), i)
            divergences.append(float(F.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean()))
        setattr(layer, family.attention, softmax)
        scores.append(sum(divergences) / len(divergences))
        on_progress(i + 1, len(layers))
    return scores


METRICS = {"kl": measured_kl, "entropy": attention_entropy}
