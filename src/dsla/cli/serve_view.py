"""What `dsla serve` prints: what it runs with, in rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsla.cli.sizes import format_bytes

if TYPE_CHECKING:
    from dsla.engine import EngineConfig, PackedDecoder
    from dsla.server.build import Service
    from dsla.server.settings import ServerSettings

_STRONG = 16


def summary(service: Service) -> list[tuple[str, str]]:
    """What an engine runs with, resolved, as rows of a name and a text."""
    import torch

    engine = service.engine
    decoder, arena, config = engine.decoder, engine.arena, engine.config
    dtype = str(decoder.dtype).removeprefix("torch.")
    top = len(decoder.order)
    objectives = (("TTFT", service.policy.ttft_seconds), ("TPOT", service.policy.tpot_seconds))
    if service.adapter is None:
        adapter = "none ships with this model: every request gets full attention"
    else:
        size = format_bytes(service.adapter.nbytes)
        states = ", bf16 states" * (decoder.state_dtype is torch.bfloat16)
        adapter = f"{service.adapter.path.name}, {top} of {decoder.n_layers} layers, {size}{states}"
    if not top:
        levels = "0 only"
    elif service.adaptive:
        levels = f"0 ... {top}, adaptive: layers are converted when memory gets short"
        levels += "".join(f", or {name} exceeds {seconds:g} s" for name, seconds in objectives if seconds is not None)
    else:
        levels = f"fixed at {config.level or 0} of 0 ... {top}, until set through /admin/level"
    if top and not decoder.foldable:
        levels += "; the adapter is not foldable: running requests keep their level"
    tokens = arena.budget_bytes // (decoder.kv_spec.bytes_per_token * decoder.n_layers)
    return [
        ("model", f"{service.model_name}, {decoder.n_layers} layers, {dtype}, context {decoder.max_tokens:,} tokens"),
        ("adapter", adapter),
        ("levels", levels),
        ("weights", f"{format_bytes(decoder.nbytes)}{', int4' * decoder.int4}"),
        ("memory", f"{format_bytes(arena.budget_bytes)} for requests: {tokens:,} tokens at level 0"),
        ("reuse", _reuse(config)),
        (
            "steps",
            f"{config.max_step_seconds:g} s or {config.max_step_tokens} tokens, {config.max_running} requests, "
            f"pages of {arena.page_tokens} tokens",
        ),
        ("device", f"{decoder.device}, {torch.get_num_threads()} threads, {_kernels(decoder)}"),
    ]


def access(settings: ServerSettings, local: bool, files: int | None = None) -> list[tuple[str, str]]:
    """Who may ask, and how much, likewise.

    Args:
        settings: of the HTTP side.
        local: whether only this machine can reach it.
        files: files that the process may have open, one for each connection; None = there is no such limit.
    """
    keys = len(settings.api_keys)
    if keys:
        api = f"{keys} API key{'s' * (keys > 1)}"
    else:
        reach = (
            "all who reach it, under any host name (--no-auth)" if settings.any_host else "all programs on this machine"
        )
        api = f"no keys: open to {reach}"
    if settings.admin_key is not None:
        admin = "/admin needs the admin key"
    else:
        admin = "/admin is off (no --admin-key)" if keys else "/admin answers to this machine only"
    bounds = [f"bodies of {format_bytes(settings.max_body_bytes)}", f"{settings.max_answers} answers a request"]
    if settings.max_concurrent is not None:
        bounds.append(f"{settings.max_concurrent} requests at once {'a key' if keys else 'in all'}")
    if settings.request_seconds is not None:
        bounds.append(f"{settings.request_seconds:g} s a request")
    if files is not None:
        bounds.append(f"{files:,} open files, one a connection")
    rows = [("access", f"{api}; {admin}"), ("limits", ", ".join(bounds))]
    if settings.cors_origins:
        rows.append(("origins", ", ".join(settings.cors_origins)))
    if not local and min(map(len, settings.api_keys), default=_STRONG) < _STRONG:
        rows.append(("warning", f"an API key has fewer than {_STRONG} characters and may be guessed"))
    return rows


def _kernels(decoder: PackedDecoder) -> str:
    """What computes; where it is PyTorch, why."""
    import torch

    from dsla.cli.diagnosis import find_kernels
    from dsla.ops.cpu import native

    if native(decoder.weights.norm.weight):
        return "native kernels"
    if decoder.dtype is not torch.bfloat16:
        dtype = str(decoder.dtype).removeprefix("torch.")
        return f"PyTorch: native kernels compute in bfloat16 (--weights bf16), this model in {dtype}"
    reason = find_kernels().reason
    return f"PyTorch: {reason.splitlines()[0]}" if reason else "PyTorch"


def _reuse(config: EngineConfig) -> str:
    kept = "all free memory" if config.cache_bytes is None else format_bytes(config.cache_bytes)
    parked = f"; up to {format_bytes(config.park_bytes)} parked" if config.park_bytes else ""
    return f"{kept if config.cache_bytes != 0 else 'no memory'} for prefixes of earlier requests{parked}"
