"""Pure tensor functions of dual-state linear attention: no modules, no model types, no engine types.

Shapes legend, used by every docstring of the package:

    B  batch            N  sequences (dense: N = B; packed: rows of a ragged batch)
    T  tokens           S  recurrent states a KV head (two: 0 = history, 1 = recency)
    H  query heads      K  key / feature width
    G  KV heads         V  value width (one more where a normaliser column is appended)
    R  H // G, query heads that share one KV head

Tensors are sequence-first (`[B, T, H, K]`), states are `[N, S, G, K, V]` in fp32 (fp64 for fp64 inputs). Gates are in log space
and <= 0, `log_g` is `[B, T, S, G, K]` (vector gates) or `[B, T, S, G, 1]` (scalar gates). Ragged batches are packed into
B = 1 and described by `cu_seqlens` `[N + 1]` (int64, starts at 0, ends at T). The recurrence of state s is

    state[t] = exp(log_g[t]) * state[t-1] + k[t]^T v[t]        o[t] = q[t] state[t]

which is equation (4)/(5) of Ro et al., ICML 2025, before the two reads are mixed.
"""

from dsla.ops.attention import window_attention
from dsla.ops.chunk import LOG_GATE_FLOOR, chunk_dsla
from dsla.ops.fold import fold_kv
from dsla.ops.naive import naive_dsla
from dsla.ops.paged import attend_decode, attend_prefill, gathered
from dsla.ops.recurrent import recurrent_dsla
from dsla.ops.rows import rms_norm, rotate, silu_mul

__all__ = [
    "LOG_GATE_FLOOR",
    "attend_decode",
    "attend_prefill",
    "chunk_dsla",
    "fold_kv",
    "gathered",
    "naive_dsla",
    "recurrent_dsla",
    "rms_norm",
    "rotate",
    "silu_mul",
    "window_attention",
]
