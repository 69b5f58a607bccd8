"""How several tensors share one stretch of bytes, repeated through a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from dsla.mixers.base import TensorSpec

ALIGNMENT = 64


class Layout:
    """Tensors laid one after the other, each at a multiple of 64 bytes.

    Args:
        shapes: name -> shape of the tensor.
        specs: name -> spec whose dtype the tensor has.

    Attributes:
        nbytes: bytes of all of them, a multiple of 64.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, TensorSpec]) -> None:
        self._tensors = []
        self.nbytes = 0
        for name, shape in shapes.items():
            dtype = specs[name].dtype
            self._tensors.append((name, shape, dtype, self.nbytes))
            self.nbytes += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor, count: int, stride_bytes: int) -> dict[str, Tensor]:
        """Views of `count` repetitions of the layout, one every `stride_bytes`.

        Args:
            buffer: bytes `[n]`, uint8, aligned to 64, n a multiple of 64.
            count: repetitions.
            stride_bytes: bytes from one to the next, a multiple of 64.

        Returns:
            Name -> `[count, *shape]`, contiguous but for the first axis.
        """
        views = {}
        for name, shape, dtype, offset in self._tensors:
            strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
            views[name] = buffer.view(dtype).as_strided(
                (count, *shape), (stride_bytes // dtype.itemsize, *strides), offset // dtype.itemsize
            )
        return views
