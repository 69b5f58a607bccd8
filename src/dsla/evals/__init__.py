"""Measures of what is left of the teacher at each level."""

from dsla.evals.perplexity import perplexity

__all__ = ["perplexity"]
