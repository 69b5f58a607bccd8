"""`dsla serve`: the OpenAI-compatible server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from dsla import __version__
from dsla.cli.sizes import format_bytes, parse_bytes
from dsla.errors import ConfigError

if TYPE_CHECKING:
    from dsla.engine import EngineConfig
    from dsla.server.build import Service

_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)] = 8000,
    memory: Annotated[
        str | None, typer.Option(help="Budget of KV caches and states, as 512MiB. Default: half of the free memory.")
    ] = None,
    level: Annotated[
        int | None, typer.Option(help="Fixed level of all requests: how many layers are converted.", min=0)
    ] = None,
    adaptive: Annotated[
        str | None,
        typer.Option(help="on, off: convert layers under load. Default: on, if there is an adapter and no --level."),
    ] = None,
    page_tokens: Annotated[int, typer.Option(help="Tokens of a KV page.", min=1)] = 16,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens of one step, at most.", min=2)] = 512,
    max_step_seconds: Annotated[
        float | None,
        typer.Option(
            help="Time of one step, at most: prompts are read in chunks that keep to it. Default: 0.25; less by --slo-tpot.",
            min=0.001,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Bytes of finished requests kept for those that begin alike; 0: none. Default: all free."),
    ] = None,
    park: Annotated[
        str, typer.Option(help="Memory beside --memory for requests that must wait in the middle; 0: they recompute.")
    ] = "0",
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are answered 429, try again later.", min=1)
    ] = 4096,
    weights: Annotated[
        str | None, typer.Option(help="bf16, or int4: four bits, in groups of 32. Default: the model's own dtype.")
    ] = None,
    state_dtype: Annotated[
        str | None, typer.Option(help="fp32, or bf16: states of converted layers take half the bytes. Default: fp32.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads to compute with. Default: the fastest number, by measurement.", min=1)
    ] = None,
    slo_ttft: Annotated[
        float | None,
        typer.Option(help="Objective for the time to first token, seconds: if missed, layers are converted."),
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(help="Objective for the time between two tokens of a request, seconds, likewise.")
    ] = None,
) -> None:
    """Serve a model with OpenAI's API; its layers are converted while requests run."""
    memory_bytes = parse_bytes(memory, "--memory") if memory is not None else None
    cache_bytes = parse_bytes(cache, "--cache", 0) if cache is not None else None
    park_bytes = parse_bytes(park, "--park", 0)
    if adaptive not in (None, "on", "off"):
        raise ConfigError(f"--adaptive must be on or off, found {adaptive!r}")
    try:
        from dsla.server.run import bind, server, url
    except ModuleNotFoundError as error:
        raise ConfigError(f"dsla serve needs {error.name}: pip install 'dsla[serve]'") from None

    with bind(host, port) as sock:
        typer.echo(f"dsla {__version__}: loading {model or 'the default model'}")
        from dsla.engine import AsyncEngine
        from dsla.server.app import build_app
        from dsla.server.build import EngineSettings, build_engine

        service = build_engine(
            EngineSettings(
                model=model,
                adapter=adapter,
                memory_bytes=memory_bytes,
                level=level,
                adaptive=None if adaptive is None else adaptive == "on",
                page_tokens=page_tokens,
                max_step_tokens=max_step_tokens,
                max_step_seconds=max_step_seconds,
                cache_bytes=cache_bytes,
                park_bytes=park_bytes,
                max_waiting=max_waiting,
                weights=weights,
                state_dtype=state_dtype,
                threads=threads,
                slo_ttft=slo_ttft,
                slo_tpot=slo_tpot,
            )
        )
        app = build_app(AsyncEngine(service.engine), service.tokenizer, service.model_name)
        rows = summary(service)
        if host not in _LOCAL:
            rows.append(("warning", "reachable from other machines, without keys; /admin answers to this one only"))
        width = max(len(name) for name, _ in rows)
        typer.echo("\n".join(f"  {name:<{width}}  {text}" for name, text in rows))
        typer.echo(f"Serving OpenAI's API on {url(sock)}/v1 (Ctrl-C stops)")
        with contextlib.suppress(KeyboardInterrupt):
            server(app, _say_draining).run(sockets=[sock])
        typer.echo("Stopped")


def _say_draining(requests: int) -> None:
    if requests:
        typer.echo(f"Finishing {requests} open request{'s' * (requests > 1)} (Ctrl-C again stops now)")


def summary(service: Service) -> list[tuple[str, str]]:
    """What a server runs with, resolved, as rows of a name and a text."""
    import torch

    from dsla.ops.cpu import native

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
    kernels = "native kernels" if native(decoder.weights.norm.weight) else "PyTorch"
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
        ("device", f"{decoder.device}, {torch.get_num_threads()} threads, {kernels}"),
    ]


def _reuse(config: EngineConfig) -> str:
    kept = "all free memory" if config.cache_bytes is None else format_bytes(config.cache_bytes)
    parked = f"; up to {format_bytes(config.park_bytes)} parked" if config.park_bytes else ""
    return f"{kept if config.cache_bytes != 0 else 'no memory'} for prefixes of earlier requests{parked}"
