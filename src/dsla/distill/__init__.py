"""Conversion as training: data, layer objective, the chain over layers, checkpoints that survive a kill."""

from dsla.distill.chain import convert
from dsla.distill.recipe import Recipe

__all__ = ["Recipe", "convert"]
