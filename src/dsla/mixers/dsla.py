"""The DSLA mixer: recurrent states for what is far, an exact window and sinks for what is near or first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsla.errors import ConfigError
from dsla.mixers.base import AttentionShape, Memory, StateSpec, TensorSpec
from dsla.mixers.config import DslaConfig
from dsla.mixers.features import FEATURE_MAPS
from dsla.mixers.gates import Gates
from dsla.mixers.mixing import Mixing
from dsla.ops import chunk_dsla, fold_kv, gathered, recurrent_dsla, window_attention
from dsla.ops.cpu import MAX_DIM, MAX_NEAR, MAX_STATES, DslaWeights, PageTable, native
from dsla.ops.rounding import rounded
from dsla.ops.shapes import state_dtype


class LowRank(nn.Module):
    """A low-rank delta `[..., n_in] -> [..., n_out]` that starts at zero and computes in its own dtype; rank 0 is none."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, n_in) * n_in**-0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(self.down.dtype), self.down), self.up).to(x.dtype)


class DslaMixer(nn.Module):
    """Dual-state linear attention of one layer (Ro et al., ICML 2025, with the options of `DslaConfig`).

    The host computes q, k and v with the teacher's projections, adds `q_delta(x)` to q before the rotation, and `o_delta(y)`
    to the projected output. Keys and values reach the mixer in the cache's dtype, so that folding a cache gives the very
    states a live run would have had. States, features, gates and mixing weights are fp32 (fp64 in an fp64 model); states can
    be kept in bfloat16 between calls (`dsla.ops.rounding`).

    Args:
        config: the mixer's settings.
        shape: sizes of the attention layer.

    Attributes:
        states_off: states nothing is read from; with all of them, window and sinks only, the floor an adapter must beat.
    """

    def __init__(self, config: DslaConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape, self.states_off = config, shape, frozenset[int]()
        heads, groups, dim = shape.n_heads, shape.n_kv_heads, shape.head_dim
        self.width = config.feature_width(dim)
        feature_map = FEATURE_MAPS[config.feature_map]
        self.features_q = feature_map(heads, dim, self.width)
        self.features_k = feature_map(groups, dim, self.width)
        gate_width = self.width if config.gate_shape == "vector" else 1
        from_key = config.gate_source == "key"
        self.gates = Gates(
            config.n_states, groups, dim if from_key else shape.hidden_size, gate_width, config.gate_temperature,
            config.log_gate_floor, per_head=from_key,
        )  # fmt: skip
        self.mixing = Mixing(config, heads, dim, self.width)
        self._in_kernels = _in_kernels(config, dim)
        self.q_delta = LowRank(shape.hidden_size, heads * dim, config.delta_rank)
        self.o_delta = LowRank(heads * dim, shape.hidden_size, config.delta_rank)

    @property
    def all_states(self) -> frozenset[int]:
        """Indices of all its states, for `states_off`."""
        return frozenset(range(self.config.n_states))

    def state_spec(self, dtype: torch.dtype, states: torch.dtype | None = None) -> StateSpec:
        """Memory of one request.

        Args:
            dtype: the KV cache's, which window and sinks share.
            states: what states are kept in. Default: what they are computed in, fp32 (fp64 for fp64).
        """
        config, groups, dim = self.config, self.shape.n_kv_heads, self.shape.head_dim
        columns = dim + (config.normalizer != "none")
        window = TensorSpec((config.window, groups, dim), dtype)
        sinks = TensorSpec((config.sinks, groups, dim), dtype)
        kept = TensorSpec((config.n_states, groups, self.width, columns), states or state_dtype(dtype))
        return StateSpec(
            per_token={},
            fixed={"states": kept, "window_k": window, "window_v": window, "sinks_k": sinks, "sinks_v": sinks},
        )

    def prefill(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Mixes T new tokens of each of B requests; differentiable.

        Args:
            x: the layer's (normalised) input `[B, T, hidden]`; read only by gates of source `hidden`.
            q: queries `[B, T, H, D]`, rotated if the config says so.
            k: keys `[B, T, G, D]`, as q.
            v: values `[B, T, G, D]`.
            memory: what earlier tokens left, name -> `[B, *spec]`. Default: nothing.
            lengths: tokens seen before, `[B]` int64. Default: none.

        Returns:
            `y` `[B, T, H, D]` in q's dtype, and the new memory (the given one is not changed).
        """
        batch, tokens = q.shape[:2]
        if lengths is None:
            lengths = torch.zeros(batch, dtype=torch.int64, device=q.device)
        if memory is None:
            memory = self.state_spec(k.dtype).zeros(batch, q.device)
        if tokens == 0:
            return torch.zeros_like(q), memory
        window = self.config.window
        past = (lengths.view(-1, 1) - window + torch.arange(window, device=q.device)) % max(window, 1)
        k_near = torch.cat([_take(memory["window_k"], past), k], 1)
        v_near = torch.cat([_take(memory["window_v"], past), v], 1)
        sinks_k = self._sinks(memory["sinks_k"], k, lengths)
        sinks_v = self._sinks(memory["sinks_v"], v, lengths)

        positions = lengths.view(-1, 1) + torch.arange(tokens, device=q.device) - window
        features, values, log_g = self._state_inputs(x, k_near[:, :tokens], v_near[:, :tokens], positions)
        reads, states = chunk_dsla(self.features_q(q), features, values, log_g, memory["states"])
        local = window_attention(q, k_near, v_near, lengths, sinks_k, sinks_v) if self.config.attends_locally else None
        y = self.mixing(q, reads, local, self.states_off)

        ring = (lengths.view(-1, 1) + tokens - window + torch.arange(window, device=q.device)) % max(window, 1)
        new = {
            "states": rounded(states, memory["states"].dtype, lengths + tokens),
            "window_k": _put(memory["window_k"], ring, k_near[:, tokens:]),
            "window_v": _put(memory["window_v"], ring, v_near[:, tokens:]),
            "sinks_k": sinks_k,
            "sinks_v": sinks_v,
        }
        return y.to(q.dtype), new

    def step(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pool: Memory, slots: Tensor, lengths: Tensor) -> Tensor:
        """Mixes one new token of each of N requests, changing their memory in place.

        Args:
            x: the layer's (normalised) input `[N, hidden]`.
            q: queries `[N, H, D]`.
            k: keys `[N, G, D]`.
            v: values `[N, G, D]`.
            pool: name -> `[n_slots, *spec]`, changed in place at rows `slots`.
            slots: row of each request, `[N]` int64, no row twice.
            lengths: tokens seen before, `[N]` int64.

        Returns:
            `y` `[N, H, D]` in q's dtype.
        """
        window, n_sinks = self.config.window, self.config.sinks
        kernels, weights = native(q), self._kernel_weights()
        if kernels is not None and weights is not None:
            return kernels.step(q, k, v, pool, slots, lengths, weights)
        k, v = k.to(pool["window_k"].dtype), v.to(pool["window_v"].dtype)
        if n_sinks:
            early = (lengths < n_sinks).nonzero().squeeze(1)
            pool["sinks_k"][slots[early], lengths[early]] = k[early]
            pool["sinks_v"][slots[early], lengths[early]] = v[early]
        if window:
            ring = lengths % window
            k_out, v_out = pool["window_k"][slots, ring], pool["window_v"][slots, ring]
            pool["window_k"][slots, ring], pool["window_v"][slots, ring] = k, v
        else:
            k_out, v_out = k, v
        features, values, log_g = self._state_inputs(
            x.unsqueeze(1), k_out.unsqueeze(1), v_out.unsqueeze(1), (lengths - window).unsqueeze(1)
        )
        reads = recurrent_dsla(
            self.features_q(q),
            features.squeeze(1),
            values.squeeze(1),
            log_g.squeeze(1),
            pool["states"],
            slots,
            lengths + 1,
        )
        local = self._attend_near(q, pool, slots, lengths) if self.config.attends_locally else None
        local = None if local is None else (local[0].unsqueeze(1), local[1].unsqueeze(1))
        y: Tensor = self.mixing(q.unsqueeze(1), reads.unsqueeze(1), local, self.states_off)
        return y.squeeze(1).to(q.dtype)

    def extend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pool: Memory, slot: int, prior: int) -> Tensor:
        """Mixes T new tokens of one request, changing its memory in place.

        Args:
            x: the layer's (normalised) input `[T, hidden]`.
            q: queries `[T, H, D]`.
            k: keys `[T, G, D]`.
            v: values `[T, G, D]`.
            pool: name -> `[n_slots, *spec]`, changed in place at row `slot`.
            slot: row of the request.
            prior: tokens seen before.

        Returns:
            `y` `[T, H, D]` in q's dtype.
        """
        kernels, weights = native(q), self._kernel_weights()
        if kernels is not None and weights is not None:
            return kernels.extend(q, k, v, pool, slot, prior, weights)
        memory = {name: part[slot].unsqueeze(0) for name, part in pool.items()}
        lengths = torch.tensor([prior], device=q.device)
        x, q, k, v = (part.unsqueeze(0) for part in (x, q, k, v))
        y, memory = self.prefill(x, q, k, v, memory, lengths)
        for name, value in memory.items():
            pool[name][slot] = value[0]
        return y[0]

    def fold(self, k: Tensor, v: Tensor) -> Memory:
        """The memory a request would have had, had this layer been converted from its first token on.

        Args:
            k: the cached keys of one request `[T, G, D]`, rotated.
            v: its cached values `[T, G, D]`.

        Returns:
            Name -> `[1, *spec]`, states in what they are computed in.

        Raises:
            ConfigError: if the mixer's gates read more than a cache keeps.
        """
        if not self.config.foldable:
            raise ConfigError(
                f"this mixer is not foldable (gate_source={self.config.gate_source!r}, rope={self.config.rope}): "
                "live requests keep their level, only new ones can start converted"
            )
        tokens, window, n_sinks = k.shape[0], self.config.window, self.config.sinks
        memory = self.state_spec(k.dtype).zeros(1, k.device)
        left = max(tokens - window, 0)
        if left:
            positions = torch.arange(left, device=k.device).unsqueeze(0)
            nothing = k.new_empty(1, left, 0)
            features, values, log_g = self._state_inputs(nothing, k[None, :left], v[None, :left], positions)
            memory["states"] = fold_kv(features, values, log_g)
        kept = torch.arange(left, tokens, device=k.device)
        if window:
            memory["window_k"][0, kept % window], memory["window_v"][0, kept % window] = k[kept], v[kept]
        first = min(tokens, n_sinks)
        memory["sinks_k"][0, :first], memory["sinks_v"][0, :first] = k[:first], v[:first]
        return memory

    def fold_pages(self, pages: Memory, table: PageTable, tokens: int) -> Memory:
        """`fold` of a cache that lies in pages.

        Args:
            pages: `k` and `v`, `[n_units, page_tokens, G, D]`.
            table: the request's pages.
            tokens: tokens cached.
        """
        kernels, weights = native(pages["k"]), self._kernel_weights()
        if kernels is None or weights is None or not self.config.foldable:
            return self.fold(*gathered(pages, table, tokens))
        memory = self.state_spec(pages["k"].dtype).zeros(1)
        kernels.fold(pages, table, tokens, memory, self.shape.n_heads, weights)
        return memory

    def _kernel_weights(self) -> DslaWeights | None:
        """What the native kernels need, or None where they do not compute what this mixer does."""
        if not self._in_kernels or self.states_off:
            return None
        gates, mixing = self.gates, self.mixing
        weights: tuple[Any, ...] = (
            self.features_q.weight, self.features_k.weight, gates.weight, gates.bias, mixing.weight, mixing.bias,
        )  # fmt: skip
        if any(weight.dtype is not torch.float32 for weight in weights):
            return None
        return DslaWeights(weights, self.config.gate_temperature, self.config.log_gate_floor)

    def _state_inputs(self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, values and log gates of tokens entering the states; no-ops where `positions` `[B, T]` are sinks or < 0."""
        enters = positions >= self.config.sinks
        features = self.features_k(k) * enters[..., None, None]
        values = v.to(features.dtype)
        if self.config.normalizer != "none":
            values = F.pad(values, (0, 1), value=1.0)
        log_g = self.gates(k if self.config.gate_source == "key" else x)
        return features, values, log_g * enters[..., None, None, None]

    def _sinks(self, sinks: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        index = torch.arange(self.config.sinks, device=new.device) - lengths.view(-1, 1)
        arrived = (index >= 0) & (index < new.shape[1])
        return torch.where(arrived[..., None, None], _take(new, index.clamp(0, new.shape[1] - 1)), sinks)

    def _attend_near(self, q: Tensor, pool: Memory, slots: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        window, n_sinks = self.config.window, self.config.sinks
        k = torch.cat([pool["window_k"][slots], pool["sinks_k"][slots]], 1)
        v = torch.cat([pool["window_v"][slots], pool["sinks_v"][slots]], 1)
        near = torch.arange(window, device=q.device) <= lengths.view(-1, 1)
        far = torch.arange(n_sinks, device=q.device) <= lengths.view(-1, 1) - window
        allowed = torch.cat([near, far], 1).view(len(slots), 1, 1, -1)
        dtype = state_dtype(q.dtype)
        grouped = q.unflatten(1, (self.shape.n_kv_heads, -1)) * self.shape.head_dim**-0.5
        scores = (grouped @ k.permute(0, 2, 3, 1)).to(dtype).masked_fill(~allowed, -torch.inf)
        lse = scores.logsumexp(-1)
        y = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v.transpose(1, 2)
        return y.to(dtype).flatten(1, 2), lse.flatten(1, 2)


def _in_kernels(config: DslaConfig, dim: int) -> bool:
    """Whether the native kernels compute what mixers of this config and head dim do."""
    return (
        (config.feature_map, config.normalizer, config.mixing) == ("hedgehog", "shared", "query")
        and (config.gate_shape, config.gate_source) == ("scalar", "key")
        and (config.feature_width(dim), dim % 32) == (2 * dim, 0)
        and dim <= MAX_DIM
        and config.n_states <= MAX_STATES
        and config.window + config.sinks <= MAX_NEAR
    )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, n]` of `x` `[B, m, ...]`."""
    return torch.take_along_dim(x, index.view(*index.shape, *(1,) * (x.dim() - 2)), 1)


def _put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of `x` `[B, m, ...]` with `rows` `[B, n, ...]` at `index` `[B, n]`."""
    return x.scatter(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand_as(rows), rows)
