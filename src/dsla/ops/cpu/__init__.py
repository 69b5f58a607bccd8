"""Native kernels of the decode and prefill paths on a CPU: compiled on first use, in bfloat16; without them PyTorch does it."""

from dsla.ops.cpu.bindings import (
    MAX_DIM,
    MAX_NEAR,
    MAX_STATES,
    DslaWeights,
    PageTable,
    Weight,
    kernels,
    load_kernels,
    native,
    setting,
)
from dsla.ops.cpu.build import find_compiler

__all__ = [
    "MAX_DIM",
    "MAX_NEAR",
    "MAX_STATES",
    "DslaWeights",
    "PageTable",
    "Weight",
    "find_compiler",
    "kernels",
    "load_kernels",
    "native",
    "setting",
]
