"""`dsla serve`: the OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from dsla import __version__
from dsla.cli.serve_config import CONTEXT, read_config, show_config
from dsla.cli.serve_view import access, summary
from dsla.cli.sizes import parse_bytes
from dsla.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from dsla.server.settings import ServerSettings

__all__ = ["CONTEXT", "serve"]

_HTTP = "Access and limits"
_ABOUT = "Log and configuration"


def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.", envvar="DSLA_MODEL"),
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
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="Key that opens the API; repeatable. Others on this machine can see it: better in DSLA_API_KEYS or a file.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(help="File of further such keys, one a line; # begins a remark.", rich_help_panel=_HTTP),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            help="Key that opens /admin, from anywhere. Without keys, it is for this machine.", rich_help_panel=_HTTP
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            help="Serve everybody without keys: other machines, and under any host name.",
            rich_help_panel=_HTTP,
        ),
    ] = False,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Site whose pages may ask, as https://example.org, or * for all; repeatable. Default: none.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Bytes of a request, at most.", rich_help_panel=_HTTP)] = "8MiB",
    max_answers: Annotated[
        int,
        typer.Option(help="Answers one request may ask for: prompts times n.", min=1, max=256, rich_help_panel=_HTTP),
    ] = 256,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            help="Requests of one key (without keys: of all) that may be open at once; more are answered 429.",
            min=1,
            rich_help_panel=_HTTP,
        ),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds a request may take in all; 0: no bound.", min=0, rich_help_panel=_HTTP)
    ] = 600.0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds that open answers get to end when the server is stopped; 0: none.",
            min=0,
            max=86_400,
            rich_help_panel=_HTTP,
        ),
    ] = 10.0,
    log_format: Annotated[
        str, typer.Option(help="text, or json: one object a line, on standard error.", rich_help_panel=_ABOUT)
    ] = "text",
    log_level: Annotated[
        str,
        typer.Option(
            help="debug, info, warning or error; debug shows stack traces, which hold paths.", rich_help_panel=_ABOUT
        ),
    ] = "info",
    config: Annotated[
        str | None,
        typer.Option(
            help="YAML file of settings, named as the options: 'max-waiting: 8'.",
            callback=read_config,
            is_eager=True,
            rich_help_panel=_ABOUT,
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", help="Show all settings and where they came from, and stop.", rich_help_panel=_ABOUT
        ),
    ] = False,
) -> None:
    """Serve a model with OpenAI's API; its layers are converted while requests run.

    Every option is also read from the environment, --max-waiting as DSLA_MAX_WAITING, and from the file of --config. Flags
    win over the environment, and that over the file.
    """
    if print_config:
        typer.echo(show_config(context, config))
        return
    memory_bytes = parse_bytes(memory, "--memory") if memory is not None else None
    cache_bytes = parse_bytes(cache, "--cache", 0) if cache is not None else None
    park_bytes = parse_bytes(park, "--park", 0)
    if adaptive not in (None, "on", "off"):
        raise ConfigError(f"--adaptive must be on or off, found {adaptive!r}")
    try:
        from dsla.server.files import raise_file_limit
        from dsla.server.keys import read_keys
        from dsla.server.logs import FORMATS, LEVELS, logging_to
        from dsla.server.run import bind, server, url
        from dsla.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(f"dsla serve needs {error.name}: pip install 'dsla[serve]'") from None
    for name, value, known in (("--log-format", log_format, FORMATS), ("--log-level", log_level, LEVELS)):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, found {value!r}")
    settings = ServerSettings(
        api_keys=(*(api_keys or ()), *(read_keys(api_key_file) if api_key_file is not None else ())),
        any_host=no_auth,
        admin_key=admin_key,
        max_body_bytes=parse_bytes(max_body, "--max-body"),
        max_answers=max_answers,
        max_concurrent=max_concurrent,
        request_seconds=request_timeout or None,
        cors_origins=tuple(cors_origins or ()),
    )

    files = raise_file_limit()
    with _ended_by_sigterm(), bind(host, port) as sock:
        local = _is_local(sock)
        _check_keys(host, settings, local, no_auth)
        typer.echo(f"dsla {__version__}: loading {model or 'the default model'}")
        from dsla.cli.status_line import status_line
        from dsla.engine import AsyncEngine
        from dsla.server.app import build_app
        from dsla.server.build import EngineSettings, build_engine

        with logging_to(sys.stderr, log_format, log_level):
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
            app = build_app(
                AsyncEngine(service.engine), service.tokenizer, service.model_name, settings, service.adapter
            )
        rows = [*summary(service), *access(settings, local, files)]
        width = max(len(name) for name, _ in rows)
        typer.echo("\n".join(f"  {name:<{width}}  {text}" for name, text in rows))
        typer.echo(f"Serving OpenAI's API on {url(sock)}/v1 and a dashboard on {url(sock)} (Ctrl-C stops)")
        # However the server ends, the engine's thread ends before the interpreter does. On a terminal the status line takes
        # over stderr, so that the log stands above it.
        with (
            contextlib.closing(app.state.engine),
            contextlib.suppress(KeyboardInterrupt),
            status_line(app.state.engine),
            logging_to(sys.stderr, log_format, log_level),
        ):
            server(app, _say_draining, drain_seconds).run(sockets=[sock])
        typer.echo("Stopped")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM do what Ctrl-C does: the system's default would end the process before anything is put in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_draining(requests: int) -> None:
    # Nobody may be there to read it any more, and the shut-down must go on.
    if requests:
        with contextlib.suppress(OSError):
            typer.echo(f"Finishing {requests} open request{'s' * (requests > 1)} (Ctrl-C again stops now)")


def _is_local(sock: socket.socket) -> bool:
    """Whether only this machine can reach what a socket is bound to."""
    address = str(sock.getsockname()[0])
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _check_keys(host: str, settings: ServerSettings, local: bool, no_auth: bool) -> None:
    if no_auth and settings.api_keys:
        raise ConfigError("--no-auth and API keys exclude each other: give one of them")
    if not local and not settings.api_keys and not no_auth:
        raise ConfigError(
            f"other machines can reach {host}, and there is no API key: give one with --api-key-file, DSLA_API_KEYS or "
            "--api-key, or say --no-auth to serve everybody"
        )
