"""From names to a running engine: model, adapter, memory budget and policy, resolved in one place for every command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsla.adaptive import PolicyConfig, make_policy
from dsla.convert.adapter import Adapter
from dsla.convert.load import find_adapter, find_model, load_tokenizer
from dsla.engine import Engine, EngineConfig, PackedDecoder
from dsla.engine.measure import load_or_measure
from dsla.engine.threads import best_threads
from dsla.errors import ConfigError
from dsla.ops.cpu import kernels

WEIGHTS = ("bf16", "int4")
"""Forms of the weights a user can ask for."""

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of states a user can ask for."""

_MEMORY_SHARE = 0.5
_STEP_SECONDS, _STEP_SHARE = 0.25, 0.8
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        model: folder or hub name; None = the default model.
        adapter: adapter folder; None = the shipped one of the model, if there is one.
        memory_bytes: budget of KV pages and states; None = half of the memory that is free once the model is loaded.
        level: level of all requests, fixed; None = the policy decides, or 0 without one.
        adaptive: whether a policy may change levels; None = where the adapter allows it and no level is fixed.
        page_tokens: tokens of a KV page.
        max_step_tokens: tokens of a step, at most.
        max_step_seconds: time of a step, at most, as far as there is a choice; None = a quarter of a second, or four fifths
            of `slo_tpot` where that is less: whoever waits for a next token waits for a step.
        cache_bytes: bytes kept for requests that begin as earlier ones did; None = all that is free, 0 = none.
        park_bytes: memory beside the budget for what requests that must give way remember; 0 = it is computed again.
        max_waiting: requests that may wait; more are refused with 429.
        weights: `bf16`, or `int4`: projections in four bits, in groups of 32 inputs; None = the model's own dtype.
        state_dtype: what the states of converted layers are kept in, `fp32`, or `bf16` beside a bf16 model; None = fp32.
        threads: threads to compute with; None = the number that is fastest, measured at the first start.
        slo_ttft: objective of the policy for the time to the first token, seconds; None = there is none.
        slo_tpot: objective of the policy for the time from one token of a request to its next, likewise.
    """

    model: str | None = None
    adapter: str | None = None
    memory_bytes: int | None = None
    level: int | None = None
    adaptive: bool | None = None
    page_tokens: int = 16
    max_step_tokens: int = 512
    max_step_seconds: float | None = None
    cache_bytes: int | None = None
    park_bytes: int = 0
    max_waiting: int = 4096
    weights: str | None = None
    state_dtype: str | None = None
    threads: int | None = None
    slo_ttft: float | None = None
    slo_tpot: float | None = None


@dataclass(frozen=True)
class Service:
    """What `build_engine` made.

    Attributes:
        engine: the engine, not running yet.
        tokenizer: the model's.
        model_name: name for requests.
        adapter: the adapter in use, or None.
        adaptive: whether a policy changes levels from the start.
        policy: settings of that policy, or of the one that a fixed level can be given back to.
    """

    engine: Engine
    tokenizer: Any
    model_name: str
    adapter: Adapter | None
    adaptive: bool
    policy: PolicyConfig


def build_engine(settings: EngineSettings) -> Service:
    """Loads model, tokenizer and adapter and makes an engine of them.

    Args:
        settings: what to build.

    Raises:
        ModelError: the model or its tokenizer cannot be had or is not supported.
        AdapterError: the adapter is damaged or belongs to another model.
        ConfigError: settings that contradict each other or the adapter.
        EngineError: the memory budget is too small.
    """
    _check(settings)
    policy = PolicyConfig(ttft_seconds=settings.slo_ttft, tpot_seconds=settings.slo_tpot)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.weights == "int4" and kernels() is None:
        raise ConfigError(
            "int4 weights need the native kernels, without which they would be unpacked at every step, and those are off "
            "here (`dsla doctor` says why): use bf16 weights"
        )
    path, config = find_model(settings.model)
    tokenizer = load_tokenizer(path)
    dtype = torch.bfloat16 if settings.weights else config.dtype or torch.float32
    adapter = find_adapter(path, config, settings.adapter, dtype)
    states = STATES[settings.state_dtype] if settings.state_dtype else None
    decoder = PackedDecoder.load(path, adapter, dtype, int4=settings.weights == "int4", state_dtype=states)
    if settings.threads is None:
        torch.set_num_threads(best_threads(decoder))
    adaptive = _adaptive(settings, decoder)
    if settings.level is not None and settings.level > len(decoder.order):
        levels = f"this model has levels 0 ... {len(decoder.order)}{_hint(adapter)}"
        raise ConfigError(f"level {settings.level} is out of range: {levels}")
    may_adapt = _may_adapt(settings, decoder)
    if not may_adapt and (settings.slo_ttft or settings.slo_tpot):
        why = "levels are not adaptive" if decoder.order else "the model has no adapter"
        raise ConfigError(f"objectives for latency steer adaptive levels, but {why}: leave out slo_ttft and slo_tpot")
    budget = settings.memory_bytes or int(free_memory() * _MEMORY_SHARE)
    engine = Engine(
        decoder,
        decoder.arena(budget, settings.page_tokens),
        EngineConfig(
            max_step_tokens=settings.max_step_tokens,
            max_step_seconds=_step_seconds(settings),
            level=settings.level,
            cache_bytes=settings.cache_bytes,
            park_bytes=settings.park_bytes,
            max_waiting=settings.max_waiting,
        ),
        make_policy(policy) if may_adapt else None,
        cost=load_or_measure(decoder),
    )
    return Service(engine, tokenizer, _name(settings.model, path), adapter, adaptive, policy)


def free_memory() -> int:
    """Bytes this process can still take: free memory of the machine, or of its control group where that is less.

    Raises:
        ConfigError: the system does not say.
    """
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            raise ConfigError("this system does not say how much memory is free: give --memory") from None
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # `memory.current` counts files that were read, which the kernel drops where memory is asked for.
        return min(free, max(limit - used + int(stat["inactive_file"]), 0))
    except (OSError, KeyError, ValueError):
        return free


def _check(settings: EngineSettings) -> None:
    for name in ("memory_bytes", "page_tokens", "max_step_tokens", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    if settings.weights not in (None, *WEIGHTS):
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, found {settings.weights!r}")
    if settings.state_dtype not in (None, *STATES):
        raise ConfigError(f"state_dtype must be one of {', '.join(STATES)}, found {settings.state_dtype!r}")
    if settings.level is not None and settings.level < 0:
        raise ConfigError(f"level must be at least 0, found {settings.level}")
    if settings.level is not None and settings.adaptive:
        raise ConfigError("a fixed level and adaptive levels exclude each other: give one of them")


def _step_seconds(settings: EngineSettings) -> float:
    if settings.max_step_seconds is not None:
        return settings.max_step_seconds
    return _STEP_SECONDS if settings.slo_tpot is None else min(_STEP_SECONDS, _STEP_SHARE * settings.slo_tpot)


def _may_adapt(settings: EngineSettings, decoder: PackedDecoder) -> bool:
    """Whether there is a policy to switch to later, where a level is fixed at the start."""
    return settings.adaptive is not False and bool(decoder.order)


def _adaptive(settings: EngineSettings, decoder: PackedDecoder) -> bool:
    if settings.adaptive and not decoder.order:
        raise ConfigError(
            "adaptive levels need an adapter, and none ships with this model: make one with `dsla convert`"
        )
    return settings.level is None and _may_adapt(settings, decoder)


def _hint(adapter: Adapter | None) -> str:
    return "" if adapter else " (it has no adapter: make one with `dsla convert`)"


def _name(model: str | None, path: Path) -> str:
    if model is None or Path(model).exists():
        return path.resolve().name
    return model
