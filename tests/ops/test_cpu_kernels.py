"""The native CPU kernels against what PyTorch computes, in fp64 where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsla.errors import KernelError
from dsla.mixers import AttentionShape, DslaConfig, DslaMixer
from dsla.ops import attend_decode, attend_prefill, rms_norm, rotate, silu_mul
from dsla.ops.cpu import Weight, bindings, build, kernels
from dsla.ops.layer import add_attended, add_swiglu, project
from dsla.ops.linear import linear_int4, linear_packed, multiply, pack, pack_int4, rows, unpack, unpack_int4

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no C++ compiler on this machine")
PAGE = 16


@dataclass
class Table:
    units: np.ndarray

    @property
    def address(self) -> int:
        return int(self.units.ctypes.data)


@pytest.fixture
def python_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops as they are without the kernels."""
    monkeypatch.setattr(bindings, "kernels", lambda: None)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of n tokens in fp64."""
    tokens, n, repeats = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 1), v.double().repeat_interleave(repeats, 1)
    scores = torch.einsum("thd,nhd->htn", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(tokens, n, dtype=torch.bool).tril(n - tokens)
    return torch.einsum("htn,nhd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def pages_with(k: Tensor, v: Tensor, room: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Table]:
    """Page pools that hold keys and values at shuffled places, NaN elsewhere, with pages for `room` tokens."""
    count = -(-room // PAGE)
    units = torch.randperm(count + 3, generator=generator)[:count]
    pools = {}
    for name, rows_ in (("k", k), ("v", v)):
        pool = torch.full((count + 3, PAGE, *k.shape[1:]), torch.nan, dtype=k.dtype)
        place = torch.arange(len(rows_))
        pool[units[place // PAGE], place % PAGE] = rows_
        pools[name] = pool
    return pools, Table(units.numpy().copy())


@needs_kernels
@given(
    groups=st.integers(1, 3), shared=st.integers(1, 9), dim=st.sampled_from([32, 64, 96, 128, 256]),
    prior=st.integers(0, 700), tokens=st.integers(1, 130), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_attention_over_pages(groups: int, shared: int, dim: int, prior: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = prior + tokens
    k, v = (torch.randn(n, groups, dim, generator=generator).bfloat16() for _ in range(2))
    q = (2 * torch.randn(tokens, groups * shared, dim, generator=generator)).bfloat16()
    expected = attention(q, k, v)
    pools, table = pages_with(k[:prior], v[:prior], n, generator)
    assert error(attend_prefill(q, k[prior:], v[prior:], pools, table, prior), expected) < 4e-3
    units, place = torch.from_numpy(table.units), torch.arange(n)
    assert torch.equal(pools["k"][units[place // PAGE], place % PAGE], k)
    pools, table = pages_with(k[:-1], v[:-1], n, generator)
    found = attend_decode(q[-1:], k[-1:], v[-1:], pools, [table], torch.tensor([n - 1]))
    assert error(found, expected[-1:]) < 4e-3


@needs_kernels
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("at", [0, 5, 66])
def test_what_is_no_number_in_a_cache_shows(name: str, at: int) -> None:
    """In all heads that read it, and in no others."""
    generator = torch.Generator().manual_seed(0)
    cached = {part: torch.randn(68, 2, 64, generator=generator).bfloat16() for part in ("k", "v")}
    cached[name][at, 1, 3] = torch.nan
    q = torch.randn(1, 4, 64, generator=generator).bfloat16()
    for attend in (attend_decode, attend_prefill):
        pools, table = pages_with(cached["k"][:-1], cached["v"][:-1], 68, generator)
        place = ([table], torch.tensor([67])) if attend is attend_decode else (table, 67)
        found = attend(q, cached["k"][-1:], cached["v"][-1:], pools, *place)
        assert found[:, :2].isfinite().all()
        assert found[:, 2:].isnan().any(-1).all()


@needs_kernels
def test_a_request_does_not_depend_on_its_batch_or_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1200, 513, 64]
    k, v = (torch.randn(2000, 2, 64, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(len(lengths), 4, 64, generator=generator).bfloat16()
    alone, tables, pools = [], [], {"k": [], "v": []}
    start = 0
    for i, n in enumerate(lengths):
        own, table = pages_with(k[: n - 1], v[: n - 1], n, generator)
        row = slice(i, i + 1)
        alone.append(attend_decode(q[row], k[row], v[row], own, [table], torch.tensor([n - 1])))
        tables.append(Table(table.units + start))
        start += len(own["k"])
        for name, pool in own.items():
            pools[name].append(pool)
    together = {name: torch.cat(parts) for name, parts in pools.items()}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            new = slice(0, len(lengths))
            found = attend_decode(q, k[new], v[new], together, tables, torch.tensor(lengths) - 1)
            assert torch.equal(found, torch.cat(alone))
    finally:
        torch.set_num_threads(threads)


SHAPES = [
    (9, 3, 64, 64, 4, 2), (4, 4, 32, 0, 0, 1), (8, 1, 64, 16, 2, 4), (6, 2, 96, 5, 7, 2), (10, 1, 64, 64, 4, 2),
    (2, 1, 32, 300, 4, 8), (2, 1, 128, 40, 0, 1),
]  # fmt: skip


def random_mixer(heads: int, groups: int, dim: int, window: int, sinks: int, states: int) -> DslaMixer:
    torch.manual_seed(0)
    config = DslaConfig(n_states=states, window=window, sinks=sinks)
    mixer = DslaMixer(config, AttentionShape(heads * dim, heads, groups, dim)).requires_grad_(False)
    for weight in mixer.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return mixer


STATES = pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=["fp32 states", "bf16 states"])


@needs_kernels
@STATES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [[150], [1] * 20 + [100, 3, 27], [50, 1, 1, 48, 50], [7, 143]])
def test_mixer(shape: tuple[int, ...], splits: list[int], states: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = random_mixer(*shape)
    heads, groups, dim = shape[:3]
    n = sum(splits)
    q, k, v = (torch.randn(n, count, dim).bfloat16() for count in (heads, groups, groups))
    x = torch.randn(n, heads * dim).bfloat16()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        specs = mixer.state_spec(torch.bfloat16, states).fixed
        pool = {name: torch.zeros(3, *spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        start, out = 0, []
        for count in splits:
            new = slice(start, start + count)
            if count == 1:
                place = (torch.tensor([1]), torch.tensor([start]))
                out.append(mixer.step(x[new], q[new], k[new], v[new], pool, *place))
            else:
                out.append(mixer.extend(x[new], q[new], k[new], v[new], pool, 1, start))
            start += count
        return torch.cat(out), pool

    found, pool = run()
    monkeypatch.setattr(bindings, "kernels", lambda: None)
    expected, expected_pool = run()
    assert pool["states"].dtype is expected_pool["states"].dtype is states
    # Of bfloat16 states, few are rounded the other way: those that lie at their threshold within the rounding of fp32.
    assert error(pool["states"][1], expected_pool["states"][1]) < (1e-5 if states is torch.float32 else 3e-4)
    assert error(found, expected) < 6e-3
    truth = mixer.double().prefill(*(part.double().unsqueeze(0) for part in (x, q, k, v)))[0][0]
    assert error(found, truth) < (6e-3 if states is torch.float32 else 1e-2)
    for name in ("window_k", "window_v", "sinks_k", "sinks_v"):
        assert torch.equal(pool[name], expected_pool[name])
    assert not any(part[row].any() for part in pool.values() for row in (0, 2))


@needs_kernels
@STATES
def test_a_mixers_step_does_not_depend_on_its_batch_or_the_threads(states: torch.dtype) -> None:
    mixer, n = random_mixer(*SHAPES[0]), 5
    heads, groups, dim = SHAPES[0][:3]
    q, k, v = (torch.randn(n, count, dim).bfloat16() for count in (heads, groups, groups))
    x, lengths, slots = torch.randn(n, heads * dim).bfloat16(), torch.tensor([0, 3, 64, 500, 70]), torch.randperm(n)
    specs = mixer.state_spec(torch.bfloat16, states).fixed
    start = {name: torch.randn(n, *spec.shape).abs().to(spec.dtype) for name, spec in specs.items()}
    threads = torch.get_num_threads()
    runs = []
    try:
        for count, parts in ((1, [slice(0, n)]), (2, [slice(0, n)]), (1, [slice(i, i + 1) for i in range(n)])):
            torch.set_num_threads(count)
            pool = {name: part.clone() for name, part in start.items()}
            rows = [mixer.step(x[i], q[i], k[i], v[i], pool, slots[i], lengths[i]) for i in parts]
            runs.append([torch.cat(rows), *pool.values()])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 30, 64, 65, 70, 140, 700, 1500])
def test_fold(shape: tuple[int, ...], tokens: int) -> None:
    mixer = random_mixer(*shape)
    _, groups, dim = shape[:3]
    k, v = (torch.randn(tokens, groups, dim).bfloat16() for _ in range(2))
    pools, table = pages_with(k, v, tokens, torch.Generator().manual_seed(tokens))
    found, expected = mixer.fold_pages(pools, table, tokens), mixer.double().fold(k.double(), v.double())
    assert found["states"].dtype is torch.float32
    for name, part in expected.items():
        assert error(found[name], part) <= (1e-5 if name == "states" else 0.0), name


@needs_kernels
def test_fold_does_not_depend_on_the_number_of_threads() -> None:
    mixer = random_mixer(*SHAPES[0])
    k, v = (torch.randn(2000, *SHAPES[0][1:3]).bfloat16() for _ in range(2))
    pools, table = pages_with(k, v, 2000, torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(mixer.fold_pages(pools, table, 2000)["states"])
    assert torch.equal(*found)


@needs_kernels
@pytest.mark.parametrize("n", [1, 2, 7, 8, 13, 40, 64, 75])
@pytest.mark.parametrize(("n_out", "k"), [(16, 32), (80, 96), (96, 64), (48, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(n: int, n_out: int, k: int, biased: bool) -> None:
    torch.manual_seed(n)
    weight, x = torch.randn(n_out, k).bfloat16(), torch.randn(n, k).bfloat16()
    bias = torch.randn(n_out).bfloat16() if biased else None
    panels = pack(weight)
    assert torch.equal(unpack(panels), weight)
    assert torch.equal(rows(panels, torch.tensor([3, 0, n_out - 1])), weight[[3, 0, n_out - 1]])
    wide = None if bias is None else bias.double()
    assert error(linear_packed(x, panels, bias), F.linear(x.double(), weight.double(), wide)) < 3e-3
    four = pack_int4(weight)
    assert four.numel() * 4 == n_out * k * 5 // 8
    found, seen = linear_int4(x, four, bias), as_multiplied_with_int4(x)
    assert error(found, F.linear(seen, unpack_int4(four).double(), wide)) < 3e-3
    assert error(found, F.linear(x.double(), unpack_int4(four).double(), wide)) < 1e-2
    alone = torch.cat([linear_packed(row, panels, bias) for row in x.split(1)])
    assert error(alone, linear_packed(x, panels, bias)) < 3e-3


def as_multiplied_with_int4(x: torch.Tensor) -> torch.Tensor:
    """Rows as the int4 kernel sees them: where it rounds them to one int8, multiples of 1 / 127 of the largest of each 32."""
    found = kernels()
    assert found is not None
    if found.int8_parts != 1:
        return x.double()
    groups = x.double().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-300)
    return ((groups / scale).round() * scale).flatten(-2)


@needs_kernels
def test_int4_rows_do_not_depend_on_their_company() -> None:
    """Where rows are rounded their results are the same bits in any company; elsewhere they are as near as other products."""
    torch.manual_seed(0)
    four, x = pack_int4(torch.randn(48, 64).bfloat16()), torch.randn(23, 64).bfloat16()
    together = linear_int4(x, four)
    for size in (1, 2, 3, 4, 5, 22):
        apart = torch.cat([linear_int4(part, four) for part in x.split(size)])
        assert error(apart, together) < 3e-3
        if kernels().int8_parts and not kernels().tiles:
            assert torch.equal(apart, together)


@needs_kernels
@pytest.mark.parametrize("n", [6, 33])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-38])
def test_int4_with_extreme_inputs(value: float, n: int) -> None:
    """What is no number stays none, in its own row only; whatever else stays finite."""
    weight = torch.randn(32, 64).bfloat16()
    four, x = pack_int4(weight), torch.randn(n, 64).bfloat16()
    x[2, 40:] = 0
    x[2, 33] = value
    found, others = linear_int4(x, four), torch.arange(n) != 2
    assert found[others].isfinite().all()
    exact = F.linear(as_multiplied_with_int4(x), unpack_int4(four).double())
    assert error(found[others], exact[others]) < 3e-3
    if not torch.tensor(value).isfinite():
        assert not found[2].isfinite().any()
    elif value < 1:
        assert error(found[2], exact[2]) < 3e-3


@needs_kernels
@pytest.mark.parametrize("n", [1, 3, 20, 70])
@pytest.mark.parametrize(("width", "inner"), [(32, 96), (576, 64)])
@pytest.mark.parametrize("packs", [pack, pack_int4])
def test_swiglu_in_one_call_is_its_steps(packs: Callable[[Tensor], Tensor], width: int, inner: int, n: int) -> None:
    torch.manual_seed(n)
    x, norm = torch.randn(n, width).bfloat16(), torch.rand(width).bfloat16()
    up, down = (Weight(packs(torch.randn(*size).bfloat16())) for size in ((2 * inner, width), (width, inner)))
    expected = x + multiply(silu_mul(multiply(rms_norm(x, norm, 1e-5), up)), down)
    assert torch.equal(add_swiglu(x, norm, 1e-5, up, down), expected)


@needs_kernels
@pytest.mark.parametrize(("n", "changed"), [(1, slice(0, 1)), (5, slice(1, 4)), (5, None), (70, slice(3, 70))])
@pytest.mark.parametrize("turned", [64, 32])
@pytest.mark.parametrize("packs", [pack, pack_int4])
def test_attention_of_a_layer_in_two_calls_is_its_steps(
    packs: Callable[[Tensor], Tensor], turned: int, n: int, changed: slice | None
) -> None:
    torch.manual_seed(n)
    width, heads, groups, dim, rank = 96, 4, 2, 64, 32
    x, norm, attended = (
        torch.randn(n, width).bfloat16(),
        torch.rand(width).bfloat16(),
        torch.randn(n, heads * dim).bfloat16(),
    )
    qkv = Weight(packs(torch.randn((heads + 2 * groups) * dim, width).bfloat16()), torch.randn(512).bfloat16())
    o = Weight(
        packs(torch.randn(width, heads * dim).bfloat16()), None if turned == dim else torch.randn(width).bfloat16()
    )
    deltas = [
        (pack(torch.randn(rank, n_in).bfloat16()), pack(torch.randn(n_out, rank).bfloat16()))
        for n_in, n_out in ((width, heads * dim), (heads * dim, width))
    ]
    cos, sin = (f(torch.rand(n, turned) * 6).bfloat16() for f in (torch.cos, torch.sin))
    normed = rms_norm(x, norm, 1e-5)
    wide, out = multiply(normed, qkv).unflatten(1, (-1, dim)), multiply(attended, o)
    if changed is not None:
        (q_down, q_up), (o_down, o_up) = deltas
        wide[changed, :heads] += linear_packed(linear_packed(normed[changed], q_down), q_up).unflatten(1, (heads, dim))
        out[changed] += linear_packed(linear_packed(attended[changed], o_down), o_up)
    wide[:, : heads + groups] = rotate(wide[:, : heads + groups], cos, sin)
    in_q, in_o = deltas if changed is not None else (None, None)
    rows = changed or slice(0, 0)
    found = project(x, norm, 1e-5, qkv, heads, groups, cos, sin, in_q, rows)
    assert torch.equal(found[0], normed) and torch.equal(found[1], wide)
    assert torch.equal(add_attended(x, attended, o, in_o, rows), x + out)


@pytest.mark.usefixtures("python_only")
def test_a_layer_without_kernels() -> None:
    torch.manual_seed(0)
    width, heads, groups, dim = 64, 2, 1, 32
    x, norm, attended = (
        torch.randn(5, width).bfloat16(),
        torch.rand(width).bfloat16(),
        torch.randn(5, heads * dim).bfloat16(),
    )
    qkv, o, down, up = (
        torch.randn(*size).bfloat16()
        for size in ((4 * dim, width), (width, heads * dim), (32, width), (heads * dim, 32))
    )
    cos, sin = (f(torch.rand(5, dim) * 6).bfloat16() for f in (torch.cos, torch.sin))
    normed = rms_norm(x, norm, 1e-5)
    wide = F.linear(normed, qkv)
    wide[2:4, : heads * dim] += F.linear(F.linear(normed[2:4], down), up)
    expected = wide.unflatten(1, (-1, dim))
    delta = (pack(down), pack(up))
    found = project(x, norm, 1e-5, Weight(pack(qkv)), heads, groups, cos, sin, delta, slice(2, 4))[1]
    assert torch.equal(found[:, :3], rotate(expected[:, :3], cos, sin)) and torch.equal(found[:, 3:], expected[:, 3:])
    out = F.linear(attended, o)
    out[1:2] += F.linear(F.linear(attended[1:2], down), up)
    assert torch.equal(add_attended(x, attended, Weight(pack(o)), delta, slice(1, 2)), x + out)


@pytest.mark.usefixtures("python_only")
def test_linear_without_kernels() -> None:
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    assert torch.equal(linear_packed(x, pack(weight)), F.linear(x, weight))
    four = pack_int4(weight)
    assert torch.equal(linear_int4(x, four), F.linear(x, unpack_int4(four).bfloat16()))


def test_int4_keeps_a_weight_that_lies_on_its_grid() -> None:
    torch.manual_seed(0)
    bits = torch.randint(0, 16, (32, 4, 32))
    bits[..., 0], bits[..., 1] = 0, 15
    scale = torch.rand(32, 4, 1).bfloat16().float()
    weight = (bits * scale - 8 * scale).flatten(1)
    assert torch.allclose(unpack_int4(pack_int4(weight)), weight, atol=0.05 * float(scale.max()))
    again = unpack_int4(pack_int4(weight))
    assert torch.equal(unpack_int4(pack_int4(again)), again)
    spread = torch.randn(64, 96)
    step = (spread.view(64, 3, 32).amax(-1) - spread.view(64, 3, 32).amin(-1)) / 15
    assert ((unpack_int4(pack_int4(spread)) - spread).view(64, 3, 32).abs() <= 0.6 * step.unsqueeze(-1)).all()


@needs_kernels
@pytest.mark.parametrize(("n", "width"), [(1, 576), (5, 40), (70, 96)])
def test_rows(n: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(n)
    x, weight = 30 * torch.randn(n, width).bfloat16(), torch.randn(width).bfloat16()
    heads = torch.randn(n, 5, width).bfloat16()[:, 1:4]
    turned = width // 2 // 2 * 2
    cos, sin = (f(torch.rand(n, turned) * 6).bfloat16() for f in (torch.cos, torch.sin))
    found = rms_norm(x, weight, 1e-5), silu_mul(torch.cat([x, x], -1)), rotate(heads, cos, sin)
    monkeypatch.setattr(bindings, "kernels", lambda: None)
    expected = rms_norm(x, weight, 1e-5), silu_mul(torch.cat([x, x], -1)), rotate(heads, cos, sin)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-3
        assert torch.isfinite(ours).all()


def test_gradients_go_through_pytorch() -> None:
    x, weight = torch.randn(3, 64).bfloat16().requires_grad_(), torch.ones(64).bfloat16()
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None


def test_kernels_are_off_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.cache_clear()
    monkeypatch.setenv("DSLA_KERNELS", "off")
    try:
        assert kernels() is None
    finally:
        kernels.cache_clear()


def test_without_a_compiler_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    try:
        assert kernels() is None
        assert "no C++ compiler" in caplog.text and "PyTorch computes instead" in caplog.text
    finally:
        kernels.cache_clear()


@needs_kernels
def test_vectors_do_what_tiles_do() -> None:
    """On a processor with AMX the same tests without it, in a process of their own: it is asked for once."""
    asked_not_to = os.environ.get("DSLA_KERNELS") == "vectors"
    found = kernels()
    assert found is not None
    assert not (found.tiles and asked_not_to)
    if not found.tiles:
        pytest.skip("this processor has no AMX, or was asked not to use it")
    chosen = "over_pages or no_number or test_mixer or test_linear or extreme or vectors or company or swiglu"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", chosen, "-p", "no:cacheprovider"],
        env={**os.environ, "DSLA_KERNELS": "vectors"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "1 skipped" in done.stdout


@needs_kernels
def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSLA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-no-such-flag"))
    with pytest.raises(KernelError, match="no-such-flag"):
        build.library()
    assert not list((tmp_path / "kernels").iterdir())


def test_instructions_are_those_that_the_compiler_may_use() -> None:
    macros = "#define __AVX2__ 1\n#define __AVX512F__ 1\n#define __AVX512VNNI__ 1\n#define __AMX_TILE__ 1\n"
    assert build.Compiler("g++", macros).instructions == ("AVX2", "AVX-512")
    assert "AVX-512 VNNI" in build.Compiler("g++", macros + "#define __AVX512BW__ 1\n").instructions
