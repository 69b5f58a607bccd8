"""Feature maps: what queries and keys become before they meet in a state. All but `identity` are positive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureMap(nn.Module):
    """A map of heads `[..., n_heads, D]` to features `[..., n_heads, F]` in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, n_heads: int, head_dim: int, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))


class Elu(FeatureMap):
    """`elu(x) + 1` (arXiv 2006.16236)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(super().forward(x)) + 1.0


class Softmax(FeatureMap):
    """Softmax over the head dim."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Hedgehog(FeatureMap):
    """`softmax([W x, -W x])` with a learned W per head (arXiv 2402.04347), starting as the identity."""

    def __init__(self, n_heads: int, head_dim: int, width: int) -> None:
        super().__init__(n_heads, head_dim, width)
        start = torch.eye(head_dim, width // 2)
        self.weight = nn.Parameter(start.repeat(n_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        y = torch.einsum("...hd,hdf->...hf", x, self.weight.to(x.dtype))
        return torch.cat([y, -y], -1).softmax(-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": FeatureMap,
    "elu": Elu,
    "softmax": Softmax,
    "hedgehog": Hedgehog,
}
