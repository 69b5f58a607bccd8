"""The DSLA mixer: prefill, step and fold are one thing, for every split, and equal a reference written from the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsla.errors import ConfigError
from dsla.mixers import AttentionShape, DslaConfig, DslaMixer
from dsla.ops import naive_dsla

SHAPE = AttentionShape(hidden_size=12, n_heads=4, n_kv_heads=2, head_dim=6)
CONFIGS = {
    "default": DslaConfig(window=5, sinks=2, delta_rank=2),
    "vector gates": DslaConfig(window=5, sinks=2, gate_shape="vector"),
    "no sinks": DslaConfig(window=5, sinks=0),
    "sinks only": DslaConfig(window=0, sinks=3),
    "no window": DslaConfig(window=0, sinks=0),
    "state normaliser": DslaConfig(window=5, sinks=2, normalizer="state"),
    "state normaliser, no window": DslaConfig(window=0, sinks=0, normalizer="state", feature_map="elu", n_states=4),
    "one state": DslaConfig(window=3, sinks=1, n_states=1, feature_map="softmax", mixing="head"),
    "narrow": DslaConfig(window=4, sinks=1, feature_dim=4, mixing="layer"),
    "paper": DslaConfig(
        window=0, sinks=0, feature_map="identity", normalizer="none", gate_source="hidden", gate_shape="vector",
        mixing="layer", delta_rank=0, rope=False,
    ),
    "hidden gates, window": DslaConfig(window=4, sinks=1, gate_source="hidden"),
}  # fmt: skip
FOLDABLE = [name for name, config in CONFIGS.items() if config.foldable]


def make_mixer(config: DslaConfig, seed: int = 0) -> DslaMixer:
    torch.manual_seed(seed)
    mixer = DslaMixer(config, SHAPE).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return mixer


def make_inputs(tokens: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, generator=random, dtype=torch.float64)

    return normal(12), normal(4, 6), normal(2, 6), normal(2, 6)


def reference(mixer: DslaMixer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a mixer computes, from the definition: one token and one head at a time over explicit sets of tokens."""
    config, tokens, share = mixer.config, q.shape[1], 2
    window, sinks = config.window, config.sinks
    gate_input = k if config.gate_source == "key" else x
    phi_q, phi_k, log_g = mixer.features_q(q), mixer.features_k(k), mixer.gates(gate_input)
    rows = []
    for t in range(tokens):
        for h in range(4):
            g = h // share
            near = [i for i in range(t + 1) if i > t - window or (i < sinks and i <= t - window)]
            far = [i for i in range(t + 1) if i <= t - window and i >= sinks]
            sums = []
            for s in range(config.n_states):
                numerator, total = torch.zeros(6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
                for i in far:
                    if config.gate_source == "key":
                        decay = sum((log_g[0, j, s, g] for j in far if j > i), torch.zeros(()))
                    else:
                        # Hidden-state gates act when a token leaves the window, and read the token that comes in.
                        decay = sum((log_g[0, j + window, s, g] for j in far if j > i), torch.zeros(()))
                    weight = (phi_q[0, t, h] * phi_k[0, i, g] * torch.exp(decay)).sum()
                    numerator, total = numerator + weight * v[0, i, g], total + weight
                sums.append((numerator, total))
            logits = mixer.mixing.bias[min(h, mixer.mixing.bias.shape[0] - 1)]
            if mixer.mixing.weight is not None:
                logits = logits + q[0, t, h] @ mixer.mixing.weight[h]
            scores = torch.stack([q[0, t, h] @ k[0, i, g] * 6**-0.5 for i in near]).exp() if near else None
            local = None if scores is None else sum(w * v[0, i, g] for w, i in zip(scores, near, strict=True))
            if config.normalizer == "none":
                rows.append(sum(w * n for w, (n, _) in zip(logits.softmax(0), sums, strict=True)))
            elif config.normalizer == "shared":
                top = sum(w * n for w, (n, _) in zip(logits.exp(), sums, strict=True))
                bottom = sum(w * z for w, (_, z) in zip(logits.exp(), sums, strict=True))
                if local is not None:
                    top, bottom = top + local, bottom + scores.sum()  # type: ignore[union-attr]
                rows.append(top / bottom if bottom > 0 else torch.zeros(6, dtype=torch.float64))
            else:
                parts = [n / z if z > 0 else None for n, z in sums]
                if config.attends_locally:
                    parts.append(None if local is None else local / scores.sum())  # type: ignore[union-attr]
                held = [i for i, part in enumerate(parts) if part is not None]
                weights = logits[held].softmax(0)
                rows.append(sum(w * parts[i] for w, i in zip(weights, held, strict=True)))
    return torch.stack(rows).view_as(q)


def run_steps(mixer: DslaMixer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory=None, seen: int = 0):  # type: ignore[no-untyped-def]
    """The tokens one by one through `step`, on slot 1 of a pool whose other slots are poisoned."""
    spec = mixer.state_spec(k.dtype)
    pool = {
        name: torch.full_like(t.expand(3, *t.shape[1:]).contiguous(), torch.nan) for name, t in spec.zeros(1).items()
    }
    start = memory or spec.zeros(1)
    for name in pool:
        pool[name][1] = start[name][0]
    slot, ys = torch.tensor([1]), []
    for t in range(q.shape[1]):
        ys.append(mixer.step(x[:, t], q[:, t], k[:, t], v[:, t], pool, slot, torch.tensor([seen + t])))
    for tensor in pool.values():
        assert tensor[[0, 2]].isnan().all(), "a slot of somebody else was written"
    y = torch.stack(ys, 1) if ys else torch.zeros_like(q)
    return y, {name: tensor[1:2] for name, tensor in pool.items()}


def assert_same(found, expected, tolerance: float = 1e-10) -> None:  # type: ignore[no-untyped-def]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_matches_the_definition(name: str) -> None:
    mixer, inputs = make_mixer(CONFIGS[name]), make_inputs(17)
    assert_same(mixer.prefill(*inputs)[0], reference(mixer, *inputs))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(0, 150), cuts=st.lists(st.floats(0, 1), max_size=3), seed=st.integers(0, 999))
def test_any_split_is_the_same(name: str, tokens: int, cuts: list[float], seed: int) -> None:
    mixer, inputs = make_mixer(CONFIGS[name], seed), make_inputs(tokens, seed)
    expected, final = mixer.prefill(*inputs)
    bounds = sorted({0, tokens, *(int(cut * tokens) for cut in cuts)})
    memory, pieces = None, [torch.zeros_like(inputs[1][:, :0])]
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = [x[:, start:end] for x in inputs]
        if number % 2:
            y, memory = run_steps(mixer, *part, memory, start)
        else:
            y, memory = mixer.prefill(*part, memory, torch.tensor([start]))
        pieces.append(y)
    assert_same(torch.cat(pieces, 1), expected)
    if memory is not None:
        assert_same(memory, final)


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 6, 40, 200])
def test_fold_then_continue_is_the_whole_run(name: str, tokens: int) -> None:
    mixer, inputs = make_mixer(CONFIGS[name]), make_inputs(tokens + 30)
    expected, final = mixer.prefill(*inputs)
    folded = mixer.fold(inputs[2][0, :tokens], inputs[3][0, :tokens])
    rest = [x[:, tokens:] for x in inputs]
    y, memory = mixer.prefill(*rest, folded, torch.tensor([tokens]))
    assert_same(y, expected[:, tokens:])
    assert_same(memory, final)
    y, memory = run_steps(mixer, *rest, folded, tokens)
    assert_same(y, expected[:, tokens:])
    assert_same(memory, final)


def test_folded_states_are_those_of_the_naive_op() -> None:
    mixer, (_, _, k, v) = make_mixer(CONFIGS["default"]), make_inputs(60)
    k_far, v_far = k[:, 2 : 60 - 5], v[:, 2 : 60 - 5]
    ones = torch.ones_like(v_far[..., :1])
    _, expected = naive_dsla(
        torch.zeros(1, 53, 4, mixer.width), mixer.features_k(k_far), torch.cat([v_far, ones], -1), mixer.gates(k_far)
    )
    assert_same(mixer.fold(k[0], v[0])["states"], expected)


def test_requests_of_different_lengths_share_a_step() -> None:
    mixer = make_mixer(CONFIGS["default"])
    lengths = [0, 1, 7, 30]
    runs = [make_inputs(n + 1, seed=n) for n in lengths]
    spec = mixer.state_spec(torch.float64)
    pool = spec.zeros(6)
    slots = torch.tensor([4, 0, 5, 2])
    for slot, n, run in zip(slots, lengths, runs, strict=True):
        _, memory = mixer.prefill(*[x[:, :n] for x in run])
        for name in pool:
            pool[name][slot] = memory[name][0]
    last = [torch.cat([run[i][:, -1] for run in runs]) for i in range(4)]
    y = mixer.step(*last, pool, slots, torch.tensor(lengths))
    for n, run in enumerate(runs):
        assert_same(y[n], mixer.prefill(*run)[0][0, -1])


def test_batch_rows_may_have_seen_different_lengths() -> None:
    mixer, runs = make_mixer(CONFIGS["default"]), [make_inputs(40, seed=1), make_inputs(29, seed=2)]
    heads = [[x[:, :-9] for x in run] for run in runs]
    memories = [mixer.prefill(*head)[1] for head in heads]
    memory = {name: torch.cat([m[name] for m in memories]) for name in memories[0]}
    tails = [torch.cat([run[i][:, -9:] for run in runs]) for i in range(4)]
    y, _ = mixer.prefill(*tails, memory, torch.tensor([31, 20]))
    for row, run in enumerate(runs):
        assert_same(y[row], mixer.prefill(*run)[0][0, -9:])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    mixer, (x, q, k, v) = make_mixer(CONFIGS[name]), make_inputs(20)
    q = q + mixer.q_delta(x).view_as(q)
    y, _ = mixer.prefill(x, q, k, v)
    (mixer.o_delta(y.flatten(2)).square().sum() + y.square().sum()).backward()
    for parameter_name, parameter in mixer.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_extreme_gates_stay_finite_and_agree() -> None:
    mixer, inputs = make_mixer(CONFIGS["vector gates"]), make_inputs(300)
    with torch.no_grad():
        mixer.gates.bias.uniform_(-200, 60)
    y, memory = mixer.prefill(*inputs)
    assert y.isfinite().all()
    y_steps, memory_steps = run_steps(mixer, *inputs)
    assert_same(y_steps, y)
    assert_same(memory_steps, memory)
    assert_same(mixer.fold(inputs[2][0], inputs[3][0]), memory)


def test_bf16_live_run_and_fold_read_the_same_rounded_keys() -> None:
    mixer = make_mixer(CONFIGS["default"]).float()
    x, q, k, v = (tensor.bfloat16() for tensor in make_inputs(120))
    _, live = mixer.prefill(x, q, k, v)
    folded = mixer.fold(k[0], v[0])
    assert folded["states"].dtype == torch.float32 and folded["window_k"].dtype == torch.bfloat16
    torch.testing.assert_close(folded["states"], live["states"], rtol=1e-5, atol=1e-6)
    assert torch.equal(folded["window_k"], live["window_k"])


@pytest.mark.parametrize("gate_shape", ["scalar", "vector"])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (64, 4)], ids=["states only", "window and sinks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 69, 777, 5000])
def test_fold_then_continue_at_every_length(
    tokens: int, dtype: torch.dtype, tolerance: float, window: int, sinks: int, gate_shape: str
) -> None:
    config = DslaConfig(window=window, sinks=sinks, gate_shape=gate_shape)
    mixer = make_mixer(config).to(dtype)
    inputs = [x.to(dtype) for x in make_inputs(tokens + 7, seed=tokens)]
    expected, final = mixer.double().prefill(*[x.double() for x in inputs])
    mixer.to(dtype)
    folded = mixer.fold(inputs[2][0, :tokens], inputs[3][0, :tokens])
    rest = [x[:, tokens:] for x in inputs]
    for y, memory in (mixer.prefill(*rest, folded, torch.tensor([tokens])), run_steps(mixer, *rest, folded, tokens)):
        assert relative_error(y, expected[:, tokens:]) < tolerance
        assert relative_error(memory["states"], final["states"]) < tolerance


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", ["default", "vector gates", "state normaliser", "paper"])
def test_gradients_match_the_definition(name: str) -> None:
    mixer, inputs = make_mixer(CONFIGS[name]), [x.requires_grad_() for x in make_inputs(13)]
    leaves = [*inputs, *(p for n, p in mixer.named_parameters() if p.numel() and "delta" not in n)]
    gradients = []
    for y in (mixer.prefill(*inputs)[0], reference(mixer, *inputs)):
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        gradients.append(torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True))
    for found, expected in zip(*gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert_same(found, expected, 1e-9)


def test_empty_states_have_no_weight_even_beside_very_small_attention() -> None:
    mixer, (x, q, k, v) = make_mixer(CONFIGS["default"]), make_inputs(3)
    k = -40 * q[:, :, ::2] / q[:, :, ::2].norm(dim=-1, keepdim=True) * 6**0.5
    q = -k.repeat_interleave(2, 2)
    y, _ = mixer.prefill(x, q, k, v)
    assert_same(y[0, 0], v[0, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("name", ["default", "state normaliser"])
def test_without_states_window_and_sinks_are_left(name: str) -> None:
    mixer, inputs = make_mixer(CONFIGS[name]), make_inputs(30)
    with_states, memory = mixer.prefill(*inputs)
    mixer.states_off = mixer.all_states
    without, same_memory = mixer.prefill(*inputs)
    assert_same(without[:, :7], with_states[:, :7])
    assert not torch.allclose(without[:, 8:], with_states[:, 8:])
    assert_same(run_steps(mixer, *inputs)[0], without)
    assert torch.equal(memory["states"], same_memory["states"])
    _, q, k, v = inputs
    t, near = 29, [0, 1, 25, 26, 27, 28, 29]
    weights = (q[0, t, 3] @ k[0, near, 1].T * 6**-0.5).softmax(-1)
    assert_same(without[0, t, 3], weights @ v[0, near, 1])


@pytest.mark.parametrize("name", ["default", "state normaliser", "state normaliser, no window", "paper"])
def test_a_state_left_out_is_not_read(name: str) -> None:
    mixer, inputs = make_mixer(CONFIGS[name]), make_inputs(1)
    memory = make_mixer(CONFIGS[name]).prefill(*make_inputs(30, seed=1))[1]
    emptied = {**memory, "states": memory["states"].clone()}
    emptied["states"][:, 0] = 0
    lengths = torch.tensor([30])
    both = mixer.prefill(*inputs, memory, lengths)[0]
    left_out = run_without(mixer, 0, inputs, memory, lengths)
    assert not torch.allclose(left_out, both)
    assert_same(run_without(mixer, 0, inputs, emptied, lengths), left_out)


def run_without(mixer: DslaMixer, state: int, inputs, memory, lengths):  # type: ignore[no-untyped-def]
    mixer.states_off = frozenset([state])
    y = mixer.prefill(*inputs, memory, lengths)[0]
    mixer.states_off = frozenset()
    return y


def test_state_spec_counts_bytes() -> None:
    config = DslaConfig(window=64, sinks=4)
    spec = DslaMixer(config, AttentionShape(576, 9, 3, 64)).state_spec(torch.bfloat16)
    assert spec.fixed_bytes == 2 * 3 * 128 * 65 * 4 + 2 * 68 * 3 * 64 * 2
    assert spec.bytes_per_token == 0


def test_paper_layer_is_not_foldable() -> None:
    mixer, (_, _, k, v) = make_mixer(CONFIGS["paper"]), make_inputs(5)
    with pytest.raises(ConfigError, match="not foldable"):
        mixer.fold(k[0], v[0])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"feature_map": "relu6"}, "feature_map"),
        ({"n_states": 3}, "n_states"),
        ({"window": -1}, "window"),
        ({"normalizer": "none"}, "common scale"),
        ({"feature_map": "identity"}, "not positive"),
        ({"feature_dim": 7}, "feature_dim"),
        ({"log_gate_floor": 0.0}, "log_gate_floor"),
        ({"log_gate_floor": float("nan")}, "log_gate_floor"),
        ({"gate_temperature": float("nan")}, "gate_temperature"),
        ({"gate_shape": "vector", "log_gate_floor": -5.0}, "vector gates"),
    ],
)
def test_contradicting_settings_are_named(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DslaConfig(**settings_)  # type: ignore[arg-type]
