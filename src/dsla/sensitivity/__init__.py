"""How much each layer minds being converted, and the order that follows."""

from dsla.sensitivity.metrics import METRICS
from dsla.sensitivity.order import make_plan, plot_scores

__all__ = ["METRICS", "make_plan", "plot_scores"]
