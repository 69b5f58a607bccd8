"""When to convert: policies that turn load into levels. The engine carries out what they decide."""

from dsla.adaptive.policy import PolicyConfig, PolicyState, decide, make_policy

__all__ = ["PolicyConfig", "PolicyState", "decide", "make_policy"]
