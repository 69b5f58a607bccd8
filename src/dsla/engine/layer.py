"""One layer of the packed decoder, but for how it mixes tokens: norms, projections, MLP; fused where the kernels know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla.engine.linears import Delta, Packed, PackedDelta, Projection
from dsla.mixers import AttentionShape
from dsla.ops import rms_norm, rotate, silu_mul
from dsla.ops.cpu import Weight
from dsla.ops.layer import add_attended, add_swiglu, project


@dataclass(frozen=True)
class RmsNorm:
    """Weight `[n]` and epsilon; in fp32 at least."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class LayerNorm:
    """Weight and bias `[n]` and epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RmsNorm | LayerNorm


@dataclass(frozen=True)
class Mlp:
    """Projections of an MLP; with a gate `up` gives the gate's input first, then what it scales."""

    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    gated: bool

    @cached_property
    def packed(self) -> tuple[Weight, Weight] | None:
        """Weights of both projections where they make a SwiGLU without biases, for `dsla.ops.layer.add_swiglu`."""
        up, down = self.up, self.down
        if self.gated and self.activation is F.silu and isinstance(up, Packed) and type(up) is type(down):
            return None if up.bias is not None or down.bias is not None else (up.weight, down.weight)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if not self.gated:
            return self.down(self.activation(up))
        if self.activation is F.silu:
            return self.down(silu_mul(up))
        gate, up = up.chunk(2, -1)
        return self.down(self.activation(gate) * up)


@dataclass(frozen=True)
class LayerWeights:
    """One layer; `mlp_norm` is None where the MLP reads what attention reads, head norms where there are none."""

    attention_norm: Norm
    qkv: Projection
    o: Projection
    mlp_norm: Norm | None
    mlp: Mlp
    q_norm: Norm | None
    k_norm: Norm | None

    @cached_property
    def packed(self) -> tuple[RmsNorm, Weight, Weight] | None:
        """What `dsla.ops.layer` takes for the attention of this layer; None where it does not compute it."""
        norm, qkv, o = self.attention_norm, self.qkv, self.o
        plain = self.q_norm is None and self.k_norm is None
        if plain and isinstance(norm, RmsNorm) and isinstance(qkv, Packed) and isinstance(o, Packed):
            return norm, qkv.weight, o.weight
        return None

    def project(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        shape: AttentionShape,
        delta: Delta | None,
        rows: slice,
        plain: bool,
    ) -> AttentionInputs:
        """What attention reads.

        Args:
            hidden: the layer's input `[T, width]`.
            cos: of the tokens' positions `[T, R]`, as for `dsla.ops.rotate`.
            sin: likewise.
            shape: sizes of the attention.
            delta: added to queries of some rows before they are rotated; None = of none.
            rows: those rows.
            plain: whether queries and keys are wanted as they were before they are rotated, too.
        """
        heads, groups = shape.n_heads, shape.n_kv_heads
        if self.packed and not plain and _is_packed(delta):
            norm, qkv, _ = self.packed
            x, all_heads = project(hidden, norm.weight, norm.eps, qkv, heads, groups, cos, sin, _panels(delta), rows)
            q, k, v = all_heads.split_with_sizes([heads, groups, groups], 1)
            return AttentionInputs(x, q, k, v)
        x = self.attention_norm(hidden)
        qk, v = self.qkv(x).unflatten(1, (-1, shape.head_dim)).split_with_sizes([heads + groups, groups], 1)
        q, k = qk.split_with_sizes([heads, groups], 1)
        if delta is not None:
            delta(x[rows], q[rows].flatten(1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            qk = torch.cat([q, k], 1)
        rotated_q, rotated_k = rotate(qk, cos, sin).split_with_sizes([heads, groups], 1)
        return AttentionInputs(x, rotated_q, rotated_k, v, (q, k))

    def add_attended(self, hidden: Tensor, attended: Tensor, delta: Delta | None, rows: slice) -> Tensor:
        """`hidden` `[T, width]` and what attention adds to it.

        Args:
            hidden: the layer's input.
            attended: what its heads have read, side by side `[T, H * D]`.
            delta: added on some rows; None = on none.
            rows: those rows.
        """
        if self.packed and _is_packed(delta):
            return add_attended(hidden, attended, self.packed[2], _panels(delta), rows)
        out = self.o(attended)
        if delta is not None:
            delta(attended[rows], out[rows])
        return hidden + out

    def add_mlp(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """`hidden` `[n, width]` and what the MLP adds to it; `attended` is what attention has read."""
        norm, packed = self.mlp_norm, self.mlp.packed
        if isinstance(norm, RmsNorm) and packed is not None:
            return add_swiglu(hidden, norm.weight, norm.eps, *packed)
        return hidden + self.mlp(attended if norm is None else norm(hidden))


@dataclass(frozen=True)
class AttentionInputs:
    """What attention reads of T tokens.

    Attributes:
        x: the layer's normed input `[T, width]`.
        q: rotated queries `[T, H, D]`.
        k: rotated keys `[T, G, D]`.
        v: values `[T, G, D]`.
        plain: queries and keys before they were rotated, where they are known.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    plain: tuple[Tensor, Tensor] | None = None


def _is_packed(delta: Delta | None) -> bool:
    return delta is None or isinstance(delta, PackedDelta)


def _panels(delta: Delta | None) -> tuple[Tensor, Tensor] | None:
    return delta.panels if isinstance(delta, PackedDelta) else None
