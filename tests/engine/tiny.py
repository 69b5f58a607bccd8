"""A tiny fp64 Llama with random mixers, engines on it, and the independent reference of what an engine must compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dsla.convert.adapter import cast
from dsla.engine import (
    Decision,
    Engine,
    EngineConfig,
    PackedDecoder,
    Policy,
    RequestSummary,
    SamplingParams,
    Signals,
    StepOutput,
)
from dsla.engine.cost import CostModel
from dsla.engine.memory import RequestMemory
from dsla.engine.request import Request
from dsla.engine.sampler import Choice, choose
from dsla.engine.weights import build_weights
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from dsla.ops import naive_dsla

ORDER = (2, 0, 3)
PAGE_TOKENS = 2
EOS = 60
MIXER = DslaConfig(window=4, sinks=2, delta_rank=3, gate_temperature=2.0)


@cache
def tiny_model(dtype: torch.dtype = torch.float64, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=512, initializer_range=0.3, eos_token_id=EOS,
        bos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return model


def tiny_mixers(config: DslaConfig = MIXER, dtype: torch.dtype = torch.float64) -> dict[int, DslaMixer]:
    torch.manual_seed(11)
    shape = attention_shape(tiny_model().config)
    mixers = {layer: cast(DslaMixer(config, shape), dtype).eval().requires_grad_(False) for layer in ORDER}
    for mixer in mixers.values():
        for parameter in mixer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return mixers


@cache
def tiny_decoder(config: DslaConfig = MIXER, dtype: torch.dtype = torch.float64) -> PackedDecoder:
    model = tiny_model(dtype)
    family = family_of(model.config)
    return PackedDecoder(
        build_weights(model.state_dict(), model.config, family, dtype), model.config, family, tiny_mixers(config, dtype)
    )


class RecordingEngine(Engine):
    """An engine that remembers the logits of every token it chose, by request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logits: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.final: dict[str, StepOutput] = {}

    def _sample(self, requests: list[Request], logits: Tensor, now: float) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.logits.setdefault(request.id, []).append(row)
        super()._sample(requests, logits, now)

    def step(self) -> list[StepOutput]:
        outputs = super().step()
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).extend(output.tokens)
            if output.finish_reason is not None:
                self.final[output.request_id] = output
        return outputs

    def run(self, limit: int = 2000) -> None:
        """Steps until nothing is left to do."""
        while self.has_work:
            limit -= 1
            assert limit, "the engine does not come to an end"
            self.step()


def tiny_engine(
    units: int = 1000,
    *,
    decoder: PackedDecoder | None = None,
    policy: Policy | None = None,
    clock: Callable[[], float] = time.monotonic,
    cost: CostModel | None = None,
    page_tokens: int = PAGE_TOKENS,
    **config: Any,
) -> RecordingEngine:
    """An engine with the memory of `units` pages of `PAGE_TOKENS` tokens, whatever its own pages are."""
    decoder = decoder or tiny_decoder()
    one = decoder.arena(1 << 16, PAGE_TOKENS)
    arena = decoder.arena(units * one.page_bytes, page_tokens, poison=True)
    settings = {"max_step_tokens": 9, "max_running": 8, **config}
    return RecordingEngine(decoder, arena, EngineConfig(**settings), policy, clock, cost)


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def slow_folds(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, seconds: float) -> None:
    """Lets every conversion of a layer take so long."""
    fold = RequestMemory.fold

    def slow(memory: RequestMemory, *args: Any) -> None:
        fold(memory, *args)
        clock.now += seconds

    monkeypatch.setattr(RequestMemory, "fold", slow)


def no_policy(
    state: object, signals: Signals, summaries: Sequence[RequestSummary], now: float
) -> tuple[object, list[Decision]]:
    """A policy that never decides anything: only lack of memory converts."""
    return state, []


def random_prompt(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(0, EOS, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(
    tokens: Sequence[int],
    levels: Sequence[Sequence[int]],
    mixers: dict[int, DslaMixer],
    model: LlamaForCausalLM | None = None,
) -> Tensor:
    """Logits `[n, vocab]` after every token in fp64, computed densely over the whole sequence.

    Keys and values do not depend on how their own layer mixes, so "tokens before t at the old level, states built from
    those cached keys and values with the naive op, then on" is: every token of every layer mixed as its level says,
    over all keys and values before it.
    """
    model = model or tiny_model()
    weights, config = model.state_dict(), model.config
    order = list(mixers)
    n, dim, heads, groups = len(tokens), config.head_dim, config.num_attention_heads, config.num_key_value_heads
    level = torch.tensor([next(at for start, at in reversed(levels) if start <= i) for i in range(n)])
    rotary = model.model.rotary_emb
    cos, sin = (x[0].unsqueeze(1) for x in rotary(torch.zeros(1, dtype=torch.float64), torch.arange(n).unsqueeze(0)))

    def weight(name: str) -> Tensor:
        return weights[f"{name}.weight"].double()

    def norm(x: Tensor, name: str) -> Tensor:
        return weight(name) * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotate(x: Tensor) -> Tensor:
        half = dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    hidden = weight("model.embed_tokens")[torch.tensor(tokens)]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = norm(hidden, f"{name}.input_layernorm")
        q, k, v = (x @ weight(f"{name}.self_attn.{p}_proj").T for p in "qkv")
        q, k, v = q.view(n, heads, dim), k.view(n, groups, dim), v.view(n, groups, dim)
        out = softmax_read(rotate(q), rotate(k), v)[0].flatten(1) @ weight(f"{name}.self_attn.o_proj").T
        if layer in mixers:
            mixer = mixers[layer]
            q = q + (x @ mixer.q_delta.down.T @ mixer.q_delta.up.T).view(n, heads, dim)
            q, k = (rotate(q), rotate(k)) if mixer.config.rope else (q, k)
            mixed = dsla_read(mixer, x, q, k, v).flatten(1)
            delta = mixed @ mixer.o_delta.down.T @ mixer.o_delta.up.T
            converted = (level > order.index(layer)).unsqueeze(1)
            out = torch.where(converted, mixed @ weight(f"{name}.self_attn.o_proj").T + delta, out)
        hidden = hidden + out
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate, up = (x @ weight(f"{name}.mlp.{p}_proj").T for p in ("gate", "up"))
        hidden = hidden + (gate * gate.sigmoid() * up) @ weight(f"{name}.mlp.down_proj").T
    return norm(hidden, "model.norm") @ weight("lm_head").T


def softmax_read(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense attention: output `[n, H, D]` and log normaliser `[n, H]`."""
    n, repeat = len(q), q.shape[1] // k.shape[1]
    allowed = torch.ones(n, n, dtype=torch.bool).tril() if allowed is None else allowed
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1).T


def dsla_read(mixer: DslaMixer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A converted layer's output of every token, over all keys and values, with the naive op."""
    config, n = mixer.config, len(q)
    features, values, log_g = mixer.features_k(k), v, mixer.gates(k if config.gate_source == "key" else x)
    if config.normalizer != "none":
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    features = torch.where((torch.arange(n) >= config.sinks).view(n, 1, 1), features, 0.0)
    log_g = torch.where((torch.arange(n) >= config.sinks).view(n, 1, 1, 1), log_g, 0.0)

    def late(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(config.window, *tensor.shape[1:]), tensor])[:n].unsqueeze(0)

    reads, _ = naive_dsla(mixer.features_q(q).unsqueeze(0), late(features), late(values), late(log_g))
    if not config.attends_locally:
        return mixer.mixing(q.unsqueeze(0), reads, None)[0]  # type: ignore[no-any-return]
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n).unsqueeze(0)
    near = (j <= i) & ((j > i - config.window) | (j < config.sinks))
    y, lse = softmax_read(q, k, v, near)
    return mixer.mixing(q.unsqueeze(0), reads, (y.unsqueeze(0), lse.unsqueeze(0)))[0]  # type: ignore[no-any-return]


def assert_as_reference(
    engine: RecordingEngine,
    name: str,
    prompt: list[int],
    params: SamplingParams | None = None,
    tolerance: float = 1e-9,
) -> None:
    """All logits a request's tokens were chosen by are the reference's for its tokens and level history."""
    output = engine.outputs.get(name, [])
    found = engine.logits.get(name, [])
    if not found:
        reason = engine.final[name].finish_reason
        assert reason == "abort", f"request {name} ended with {reason!r} without a token"
        return
    levels = engine.final[name].levels
    tokens = (prompt + output)[: len(prompt) + len(found) - 1]
    expected = reference_logits(tokens, levels, engine.decoder.mixers)[len(prompt) - 1 :]
    error = (torch.stack(found) - expected).abs().max().item()
    assert error <= tolerance, f"request {name}: logits differ by {error:.2e}, levels {levels}"
    alone = Request(name, prompt, params or SamplingParams(), len(output) + 1, params.seed or 0 if params else 0, 0, 0)
    for token, row in zip(output, expected, strict=False):
        (choice,) = choose(row.unsqueeze(0), [alone])
        assert isinstance(choice, Choice) and choice.token == token
        alone.output.append(token)
