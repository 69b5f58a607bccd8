"""`dsla chat`: a conversation in the terminal, computed in this process or by a server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.cli.sizes import parse_bytes
from dsla.errors import ConfigError

if TYPE_CHECKING:
    from dsla.cli.answers import Source


def chat(
    url: Annotated[
        str | None, typer.Option(help="Ask this server, as http://127.0.0.1:8000, and load no model here.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key, where the server wants one.", envvar="DSLA_API_KEY")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub name; with --url, a name it serves. Default: SmolLM2-135M-Instruct."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    level: Annotated[
        int | None, typer.Option(help="How many layers are converted to linear attention. Default: by memory.", min=0)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Budget of KV caches and states, as 512MiB. Default: half of the free memory.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads to compute with. Default: the fastest number, by measurement.", min=1)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, at most.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.", min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Chat with a model: a line is a turn, /help lists commands. Lines may be piped in, then answers are all it prints."""
    own = {"--adapter": adapter, "--memory": memory, "--threads": threads}
    given = [name for name, value in own.items() if value is not None]
    if url is not None and given:
        raise ConfigError(
            f"{given[0]} is about a model in this process, and --url asks a server: leave one of them out"
        )
    memory_bytes = parse_bytes(memory, "--memory") if memory is not None else None
    from dsla.cli.answers import Local, Remote, Sampling
    from dsla.cli.conversation import Conversation
    from dsla.cli.talk import Pipe, Terminal

    sampling = Sampling(max_tokens, temperature, seed)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with asyncio.Runner() as runner:
        if url is not None:
            source: Source = runner.run(Remote.connect(url, model, api_key, sampling))
        else:
            from dsla.server.build import EngineSettings, build_engine

            if terminal:
                typer.echo(f"Loading {model or 'the default model'}")
            settings = EngineSettings(model=model, adapter=adapter, memory_bytes=memory_bytes, threads=threads)
            source = Local(build_engine(settings), sampling)
        with _closing(source, runner):
            conversation = Conversation(source.max_level, system)
            if level is not None:
                conversation.set_level(str(level))
            (Terminal if terminal else Pipe)(source, conversation, runner).run()


@contextmanager
def _closing(source: Source, runner: asyncio.Runner) -> Iterator[None]:
    try:
        yield
    finally:
        runner.run(source.close())
