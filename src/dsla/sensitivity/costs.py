"""What measuring an order computes, counted before it starts."""

from __future__ import annotations

from dsla.distill.flops import Costs
from dsla.distill.recipe import OrderSettings
from dsla.sensitivity.measured import STRIDE
from dsla.sensitivity.metrics import METRICS


def order_flops(costs: Costs, settings: OrderSettings) -> float:
    """FLOPs of all scores a plan with these settings records.

    Args:
        costs: of the model.
        settings: the metrics, and the text they are averaged over.
    """
    tokens, layers = settings.all_windows * settings.seq_len, costs.n_layers
    block, head = costs.block(settings.seq_len), costs.head / STRIDE
    asked = {settings.metric, *settings.also}
    passes = sum(metric.cheap for metric in METRICS.values())
    flops = float(passes * layers * block)
    if asked & {"kl", "kl_worst"}:  # the same trials
        # The teacher, the way to each layer from the one before, and from each layer to the end.
        flops += (2 * layers + layers * (layers + 1) / 2) * block + (layers + 1) * head
    for _ in asked & {"greedy", "greedy_worst"}:
        trials = layers + sum(min(settings.candidates, left) for left in range(1, layers))
        flops += (layers + trials * layers / 2) * block + trials * head
    return tokens * flops
