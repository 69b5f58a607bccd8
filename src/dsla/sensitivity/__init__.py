"""How much each layer minds being converted, and the order that follows."""

from dsla.sensitivity.metrics import METRICS, label
from dsla.sensitivity.order import make_plan, plot_scores
from dsla.sensitivity.probe import Probe, Ranking

__all__ = ["METRICS", "Probe", "Ranking", "label", "make_plan", "plot_scores"]
