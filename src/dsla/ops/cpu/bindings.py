"""The compiled kernels as functions of tensors."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsla.errors import KernelError
from dsla.ops.cpu.build import library

MAX_DIM, MAX_STATES, MAX_NEAR = 256, 8, 1024
_INT4_AXES = 4
POOLS = ("states", "window_k", "window_v", "sinks_k", "sinks_v")

_log = logging.getLogger(__name__)

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_ROWS = [_pointer, _long] * 3
_Pools, _PoolBytes = _pointer * len(POOLS), _long * len(POOLS)
_SIGNATURES = {
    "dsla_attend_decode": [*[_int] * 5, *_ROWS, _pointer, _pointer, _long, _int, _pointer, _pointer, _pointer],
    "dsla_attend_prefill": [*[_int] * 5, *_ROWS, _pointer, _pointer, _long, _int, _pointer, _long, _pointer],
    "dsla_step": [*[_int] * 8, _float, _float, *[_pointer] * 6, *_ROWS, *[_pointer] * 4, _int, _pointer],
    "dsla_prefill": [_int, _long, *[_int] * 6, _float, _float, *[_pointer] * 6, *_ROWS, _pointer, _long, _int, _pointer],
    "dsla_fold": [
        _int, _long, *[_int] * 6, _float, _float, *[_pointer] * 6, _pointer, _pointer, _long, _int, _pointer, _pointer,
    ],
    "dsla_linear": [_int, *[_long] * 3, *[_pointer] * 4],
    "dsla_linear_int4": [_int, *[_long] * 3, *[_pointer] * 4],
    "dsla_add_low_rank": [_int, *[_long] * 4, *[_pointer] * 4, _long],
    "dsla_project": [
        _int, *[_long] * 6, _pointer, _pointer, _float, _int, *[_pointer] * 4, *[_long] * 3, *[_pointer] * 4,
    ],
    "dsla_add_attended": [_int, *[_long] * 3, _pointer, _pointer, _int, _pointer, _pointer, *[_long] * 3, *[_pointer] * 3],
    "dsla_add_swiglu": [_int, *[_long] * 3, _pointer, _pointer, _float, _int, *[_pointer] * 3],
    "dsla_rms_norm": [_int, _long, _long, _pointer, _pointer, _float, _pointer],
    "dsla_silu_mul": [_int, _long, _long, _pointer, _pointer],
    "dsla_rotate": [_int, *[_long] * 4, _pointer, _long, *[_pointer] * 3, _long],
}  # fmt: skip


class PageTable(Protocol):
    """The pages of one layer of one request.

    Attributes:
        units: row of the page pools of each page `[n_pages]`, int64.
        address: where `units` starts in memory.
    """

    @property
    def units(self) -> np.ndarray: ...
    @property
    def address(self) -> int: ...


@cache
def kernels() -> Kernels | None:
    """The kernels, or None where they cannot be had (a warning says why) or `DSLA_KERNELS=off` is set."""
    if setting() == "off":
        return None
    try:
        return load_kernels()
    except KernelError as error:
        _log.warning("CPU kernels are off, PyTorch computes instead: %s", error)
        return None


def load_kernels() -> Kernels:
    """The kernels, whatever the user has set; compiled now if this machine has not done so yet.

    Raises:
        KernelError: they cannot be had.
    """
    try:
        return Kernels(ctypes.CDLL(str(library())))
    except OSError as error:
        raise KernelError(str(error)) from None


def setting() -> str | None:
    """What the user has set for the kernels: `off`, `vectors` (no tile registers), or None: all that there is."""
    return os.environ.get("DSLA_KERNELS")


def native(x: Tensor) -> Kernels | None:
    """The kernels, if they compute on `x`: bfloat16 on a CPU, and no gradient is wanted."""
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return None
    return kernels()


@dataclass(frozen=True)
class DslaWeights:
    """A mixer the kernels know: hedgehog features, a shared normaliser, scalar gates from keys, query mixing; fp32.

    Attributes:
        tensors: weights of the feature maps of q and k, of the gates and their bias, of the mixing and its bias.
        temperature: divisor of the log gates.
        floor: smallest log gate.
    """

    tensors: tuple[Tensor, ...]
    temperature: float
    floor: float

    @property
    def arguments(self) -> tuple[float | int, ...]:
        """As the kernels take them."""
        return (self.temperature, self.floor, *(tensor.data_ptr() for tensor in self.tensors))


@dataclass(frozen=True)
class Weight:
    """A weight as the kernels multiply with it.

    Attributes:
        panels: from `dsla.ops.linear.pack` `[n_out / 16, k / 2, 16]`, or from `pack_int4` `[n_out / 16, k / 32, 5, 16]`; int32.
        bias: `[n_out]` bf16, or None.
    """

    panels: Tensor
    bias: Tensor | None = None

    @property
    def int4(self) -> bool:
        """Whether it is kept in four bits."""
        return self.panels.dim() == _INT4_AXES

    @property
    def arguments(self) -> tuple[int | None, ...]:
        """As the kernels take them."""
        return self.int4, self.panels.data_ptr(), None if self.bias is None else self.bias.data_ptr()


class Kernels:
    """The kernels of a compiled library; all take bfloat16 and use PyTorch's number of threads.

    Args:
        compiled: the library.

    Attributes:
        int8_parts: int8 that `linear_int4` rounds an input of few rows to: one with AVX2, two (as good as bfloat16) with
            AVX-512 VNNI, 0 = rows stay as they are.
        tiles: whether many rows are multiplied in AMX tile registers; `DSLA_KERNELS=vectors` does without.
    """

    def __init__(self, compiled: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = arguments, None
        self._attend_decode, self._attend_prefill = compiled.dsla_attend_decode, compiled.dsla_attend_prefill
        self._step, self._extend, self._fold = compiled.dsla_step, compiled.dsla_prefill, compiled.dsla_fold
        self._rms_norm = compiled.dsla_rms_norm
        self._linear, self._linear_int4 = compiled.dsla_linear, compiled.dsla_linear_int4
        self._project, self._add_attended = compiled.dsla_project, compiled.dsla_add_attended
        self._add_swiglu, self._add_low_rank = compiled.dsla_add_swiglu, compiled.dsla_add_low_rank
        self._silu_mul, self._rotate = compiled.dsla_silu_mul, compiled.dsla_rotate
        self.int8_parts, self.tiles = int(compiled.dsla_int8_parts()), bool(compiled.dsla_tiles())

    def attend_decode(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Mapping[str, Tensor], tables: Sequence[PageTable], lengths: Tensor
    ) -> Tensor:
        """One new token of each of N requests: its key and value go to their page, its query attends over all.

        Args:
            q: `[N, H, D]`, as `k` and `v` with contiguous heads.
            k: `[N, G, D]`.
            v: `[N, G, D]`.
            pages: `k` and `v`, `[n_units, page_tokens, G, D]`.
            tables: the pages of each request, with room for the new token.
            lengths: tokens seen before, `[N]` int64.

        Returns:
            `[N, H, D]`.
        """
        y = q.new_empty(q.shape)
        places = (_pointer * len(tables))(*[table.address for table in tables])
        self._attend_decode(
            torch.get_num_threads(), *q.shape[:2], *k.shape[1:], *_rows(q, k, v), *_pages(pages), places,
            lengths.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y

    def attend_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Mapping[str, Tensor], table: PageTable, prior: int
    ) -> Tensor:
        """T new tokens of one request that has seen `prior`; arguments else as `attend_decode`, `[T, ...]`."""
        y = q.new_empty(q.shape)
        self._attend_prefill(
            torch.get_num_threads(), *q.shape[:2], *k.shape[1:], *_rows(q, k, v), *_pages(pages), table.address, prior,
            y.data_ptr(),
        )  # fmt: skip
        return y

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pool: Mapping[str, Tensor],
        slots: Tensor,
        lengths: Tensor,
        weights: DslaWeights,
    ) -> Tensor:
        """The decode step of a DSLA mixer.

        Args:
            q: `[N, H, D]`, as `k` and `v` with contiguous heads.
            k: `[N, G, D]`.
            v: `[N, G, D]`.
            pool: the requests' memory, changed in place; states are fp32 or bfloat16.
            slots: row of each request, `[N]` int64.
            lengths: tokens seen before, `[N]` int64.
            weights: of the mixer.

        Returns:
            `[N, H, D]`.
        """
        y, pools = q.new_empty(q.shape), [pool[name] for name in POOLS]
        addresses = _Pools(*[part.data_ptr() for part in pools])
        row_bytes = _PoolBytes(*[part.stride(0) * part.element_size() for part in pools])
        self._step(
            torch.get_num_threads(), *_sizes(q, k, pools), *weights.arguments, *_rows(q, k, v), addresses, row_bytes,
            slots.data_ptr(), lengths.data_ptr(), _narrow(pools), y.data_ptr(),
        )  # fmt: skip
        return y

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: Mapping[str, Tensor], slot: int, prior: int, weights: DslaWeights
    ) -> Tensor:
        """T new tokens of one request that has seen `prior`, its memory at row `slot`; else as `step`, `[T, ...]`."""
        y, pools = q.new_empty(q.shape), [pool[name] for name in POOLS]
        addresses = _Pools(*[part.data_ptr() + slot * part.stride(0) * part.element_size() for part in pools])
        self._extend(
            torch.get_num_threads(), *_sizes(q, k, pools), *weights.arguments, *_rows(q, k, v), addresses, prior,
            _narrow(pools), y.data_ptr(),
        )  # fmt: skip
        return y

    def fold(
        self,
        pages: Mapping[str, Tensor],
        table: PageTable,
        tokens: int,
        memory: Mapping[str, Tensor],
        n_heads: int,
        weights: DslaWeights,
    ) -> None:
        """Fills the memory of a DSLA mixer from a KV cache.

        Args:
            pages: `k` and `v`, `[n_units, page_tokens, G, D]`.
            table: the request's pages.
            tokens: tokens cached.
            memory: of one request, `[1, ...]`, contiguous and zero; states are fp32.
            n_heads: query heads.
            weights: of the mixer.
        """
        pools = [memory[name] for name in POOLS]
        addresses = _Pools(*[part.data_ptr() for part in pools])
        k = pages["k"]
        sizes = (tokens, n_heads, *k.shape[2:], pools[0].shape[1], pools[1].shape[1], pools[3].shape[1])
        self._fold(torch.get_num_threads(), *sizes, *weights.arguments, *_pages(pages), table.address, addresses)

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
        """`x [n, k] w^T + bias`, contiguous; w in panels of 16 outputs, `[n_out / 16, k / 2, 16]` int32: see `linear.cpp`."""
        return self._product(self._linear, x, panels, bias)

    def linear_int4(self, x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
        """The same with int4 weights, `[n_out / 16, k / 32, 5, 16]` int32."""
        return self._product(self._linear_int4, x, panels, bias)

    def _product(self, kernel: Callable[..., None], x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
        n, k = x.shape
        n_out = panels.shape[0] * panels.shape[-1]
        y = x.new_empty(n, n_out)
        kernel(
            torch.get_num_threads(), n, k, n_out, x.data_ptr(), panels.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y

    def add_low_rank(self, x: Tensor, down: Tensor, up: Tensor, y: Tensor) -> None:
        """Adds `up(down(x))` to rows `y` `[n, n_out]`, each contiguous, of contiguous `x` `[n, k]`; weights as for `linear`."""
        n, k = x.shape
        self._add_low_rank(
            torch.get_num_threads(), n, k, down.shape[0] * down.shape[-1], y.shape[1], x.data_ptr(), down.data_ptr(),
            up.data_ptr(), y.data_ptr(), y.stride(0),
        )  # fmt: skip

    def project(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Weight,
        heads: int,
        groups: int,
        cos: Tensor,
        sin: Tensor,
        delta: tuple[Tensor, Tensor] | None,
        rows: slice,
    ) -> tuple[Tensor, Tensor]:
        """Normed rows `[n, width]` and their queries, keys and values `[n, H + 2 G, D]`: see `dsla.ops.layer.project`."""
        (n, width), n_out = x.shape, weight.panels.shape[0] * weight.panels.shape[-1]
        dim = n_out // (heads + 2 * groups)
        normed, y = torch.empty_like(x), x.new_empty(n, heads + 2 * groups, dim)
        self._project(
            torch.get_num_threads(), n, width, heads, groups, dim, cos.shape[1], x.data_ptr(), norm.data_ptr(), eps,
            *weight.arguments, cos.data_ptr(), sin.data_ptr(), *_delta(delta, rows), normed.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return normed, y

    def add_attended(
        self, x: Tensor, attended: Tensor, weight: Weight, delta: tuple[Tensor, Tensor] | None, rows: slice
    ) -> Tensor:
        """`x + weight attended` and a delta on some rows, `[n, width]`: see `dsla.ops.layer.add_attended`."""
        y = torch.empty_like(x)
        n, width = x.shape
        self._add_attended(
            torch.get_num_threads(), n, attended.shape[1], width, x.data_ptr(), attended.data_ptr(), *weight.arguments,
            *_delta(delta, rows), y.data_ptr(),
        )  # fmt: skip
        return y

    def add_swiglu(self, x: Tensor, norm: Tensor, eps: float, up: Weight, down: Weight) -> Tensor:
        """`x + down(silu_mul(up(rms_norm(x))))` of rows `[n, width]`, contiguous: see `dsla.ops.layer.add_swiglu`."""
        y = torch.empty_like(x)
        n, width = x.shape
        inner = up.panels.shape[0] * up.panels.shape[-1] // 2
        self._add_swiglu(
            torch.get_num_threads(), n, width, inner, x.data_ptr(), norm.data_ptr(), eps, up.int4, up.panels.data_ptr(),
            down.panels.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`weight * x / rms(x)` of rows `[..., n]`, contiguous."""
        y = torch.empty_like(x)
        width = x.shape[-1]
        self._rms_norm(
            torch.get_num_threads(), x.numel() // width, width, x.data_ptr(), weight.data_ptr(), eps, y.data_ptr()
        )
        return y

    def silu_mul(self, x: Tensor) -> Tensor:
        """`silu(gate) * up` `[T, n]` of contiguous rows `[T, 2 n]` that hold gate, then up."""
        n, width = x.shape
        y = x.new_empty(n, width // 2)
        self._silu_mul(torch.get_num_threads(), n, width // 2, x.data_ptr(), y.data_ptr())
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads `[T, n_heads, D]`, contiguous but for the first axis, rotated by cos and sin `[T, R]` of their positions."""
        y = x.new_empty(x.shape)
        self._rotate(
            torch.get_num_threads(), *x.shape, cos.shape[1], x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(),
            y.data_ptr(), y.stride(0),
        )  # fmt: skip
        return y


def _delta(delta: tuple[Tensor, Tensor] | None, rows: slice) -> tuple[int | None, ...]:
    """First row, number of rows, rank and both weights of a low-rank delta."""
    if delta is None:
        return 0, 0, 0, None, None
    down, up = delta
    return rows.start, rows.stop - rows.start, down.shape[0] * down.shape[-1], down.data_ptr(), up.data_ptr()


def _sizes(q: Tensor, k: Tensor, pools: Sequence[Tensor]) -> tuple[int, ...]:
    """Tokens or requests, heads, KV heads, head dim, states, window, sinks."""
    return (*q.shape[:2], *k.shape[1:], pools[0].shape[1], pools[1].shape[1], pools[3].shape[1])


def _narrow(pools: Sequence[Tensor]) -> int:
    """Whether states are kept as bfloat16; else they are fp32."""
    return int(pools[0].dtype is torch.bfloat16)


def _rows(*parts: Tensor) -> list[int]:
    return [number for part in parts for number in (part.data_ptr(), part.stride(0))]


def _pages(pages: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    k, v = pages["k"], pages["v"]
    return k.data_ptr(), v.data_ptr(), k.stride(0) * k.element_size(), k.shape[1]
