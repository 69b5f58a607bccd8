"""Metrics that read the teacher's attention: how spread it is, and how much of it copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsla.convert.surgery import ConvertedAttention, project
from dsla.distill.activations import Activations
from dsla.errors import DataError
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity.probe import OnProgress, Probe, Ranking, by_score

_ENTROPY_QUERIES = 32
_NEEDLE_TOKENS = 17


def attention_entropy(probe: Probe, on_progress: OnProgress) -> Ranking:
    """Entropy of the teacher's attention rows in nats, averaged over heads, windows and late queries (Ro et al., section 3).

    The paper takes the final query of one prompt; rows of the second half of every window make it less noisy.
    """
    length = probe.tokens.shape[1]
    queries = torch.linspace(length // 2, length - 1, min(_ENTROPY_QUERIES, length - length // 2)).long()
    scores = []
    for windows in _attention(probe, probe.tokens, queries, on_progress):
        entropies = [float(-(p * p.clamp_min(1e-30).log()).sum(-1).mean()) for p in windows]
        scores.append(sum(entropies) / len(entropies))
    return by_score(scores)


def retrieval_score(probe: Probe, on_progress: OnProgress) -> Ranking:
    """How much a layer's heads copy from a needle beyond window and sinks, summed over its heads.

    A needle of random tokens of the text stands somewhere in every window, and once more at its end. While the model reads
    the second copy, a head retrieves as far as it attends to the token that comes next, in the first copy. After the
    retrieval score of Wu et al. (arXiv 2404.15574, section 2): the share of needle tokens that a head copies; here the copy
    is given instead of generated, and attention is taken as it is instead of its largest entry.
    """
    prompts, queries, targets = needle_prompts(probe)
    scores = []
    for windows in _attention(probe, prompts, queries, on_progress):
        mass = [
            float(p.gather(-1, at.to(p.device).view(-1, 1, 1, 1).expand(*p.shape[:3], 1)).mean(0).sum())
            for p, at in zip(windows, targets, strict=True)
        ]
        scores.append(sum(mass) / len(mass))
    return by_score(scores)


def needle_prompts(probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    """The windows with a needle, at depths that are evenly spread over them.

    Returns:
        Prompts `[n, T]`, the queries `[m]` that read the second copy, and the positions `[n, m]` they would copy from.

    Raises:
        DataError: if all of the text is one token.
    """
    generator = torch.Generator().manual_seed(probe.seed)
    prompts, distinct = probe.tokens.clone(), probe.tokens.unique()
    count, total = prompts.shape
    window, sinks = probe.config.window, probe.config.sinks
    length = min(_NEEDLE_TOKENS, (total - window - sinks) // 3, len(distinct))
    if length < 2:
        raise DataError("the text is the same token throughout, nothing can be retrieved from it: give other data")
    last = total - length - max(window + 1, length)
    queries, targets = torch.arange(total - length, total - 1), []
    for i, prompt in enumerate(prompts):
        start = sinks + round((last - sinks) * (i + 0.5) / count)
        needle = distinct[torch.randperm(len(distinct), generator=generator)[:length]]
        prompt[start : start + length] = needle
        prompt[total - length :] = needle
        targets.append(torch.arange(start + 1, start + length))
    return prompts, queries, torch.stack(targets)


@torch.no_grad()
def _attention(probe: Probe, tokens: Tensor, queries: Tensor, on_progress: OnProgress) -> Iterator[list[Tensor]]:
    """Of every layer in turn, the attention of the queries `[m]`: for each window `[m, G, H / G, T]` fp32."""
    family, shape = family_of(probe.model.config), attention_shape(probe.model.config)
    layers, activations = probe.model.get_submodule(family.layers), Activations(probe.model, tokens.split(1))
    plain = DslaMixer(DslaConfig(delta_rank=0), shape).to(activations.trunk.device)
    future = (torch.arange(tokens.shape[1]) > queries.view(-1, 1))[:, None, None].to(activations.trunk.device)
    position = activations.trunk.position(tokens.shape[1])
    for i, layer in enumerate(layers):
        attention = ConvertedAttention(getattr(layer, family.attention), plain, family)
        norm, windows = layer.get_submodule(family.attention_norm), []
        for x in activations.at(i):
            q, k, _ = project(attention, norm(x.to(activations.trunk.device)), position)
            grouped = q[0, queries].float().unflatten(1, (shape.n_kv_heads, -1)) * shape.head_dim**-0.5
            logits = torch.einsum("tgrd,ngd->tgrn", grouped, k[0].float())
            windows.append(logits.masked_fill(future, -torch.inf).softmax(-1))
        on_progress(i + 1, len(layers))
        yield windows
