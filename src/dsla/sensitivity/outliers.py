"""A metric that reads weights and the size of what meets them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsla.distill.activations import Activations
from dsla.families import family_of
from dsla.sensitivity.probe import OnProgress, Probe, Ranking, by_score

_TIMES_THE_MEAN = 5


@torch.no_grad()
def outlier_ratio(probe: Probe, on_progress: OnProgress) -> Ranking:
    """Share of a layer's attention weights that are outliers: `|W_ij| * ||X_j||_2` is over 5 times the layer's mean.

    `X_j` is input feature j over all tokens. This is the layerwise outlier distribution of OWL (Yin et al., arXiv 2310.05175,
    section 3.2), there over all weights of a block, here over the projections q, k, v and o, which conversion is about.
    """
    model, family = probe.model, family_of(probe.model.config)
    attentions = [getattr(layer, family.attention) for layer in model.get_submodule(family.layers)]
    projections = [[getattr(attention, name) for name in (*family.qkv, family.o)] for attention in attentions]
    squares: dict[nn.Module, Tensor] = defaultdict(lambda: torch.zeros(()))

    def watch(module: nn.Module) -> Callable[[nn.Module, Any], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[module] = squares[module].to(args[0].device) + args[0].float().square().flatten(0, -2).sum(0)

        return add

    hooks = [module.register_forward_pre_hook(watch(module)) for layer in projections for module in layer]
    try:
        Activations(model, probe.tokens.split(1)).at(len(attentions), on_progress)
    finally:
        for hook in hooks:
            hook.remove()
    return by_score([_share_of_outliers(layer, squares) for layer in projections])


def _share_of_outliers(projections: list[Any], squares: dict[nn.Module, Tensor]) -> float:
    sizes = [module.weight.float().abs() * squares[module].sqrt() for module in projections]
    count: int = sum(size.numel() for size in sizes)
    limit = _TIMES_THE_MEAN * sum(float(size.sum()) for size in sizes) / count
    outliers = sum(int((size > limit).sum()) for size in sizes)
    return outliers / count
