"""Token mixers as modules over `dsla.ops`: what a layer computes between its projections, and the memory it keeps.

No Hugging Face types and no engine types here. Shapes follow the legend in `dsla.ops`.
"""

from dsla.mixers.base import AttentionShape, Memory, StateSpec, TensorSpec
from dsla.mixers.config import DslaConfig
from dsla.mixers.dsla import DslaMixer
from dsla.mixers.softmax import SoftmaxMixer

__all__ = ["AttentionShape", "DslaConfig", "DslaMixer", "Memory", "SoftmaxMixer", "StateSpec", "TensorSpec"]
