"""`dsla demo`: book openings read and continued at once, in less memory than they need at level 0."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.cli.checks import make_folder
from dsla.cli.sizes import parse_bytes
from dsla.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from dsla.bench.demo import Demo
    from dsla.bench.streams import Need
    from dsla.server.build import Service


def demo(
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Budget of KV caches and states, as 512MiB. Default: too little for all streams at level 0."),
    ] = None,
    streams: Annotated[int, typer.Option(help="How many books are read at once.", min=1, max=8)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens each stream writes.", min=1)] = 96,
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("demo"),
    threads: Annotated[
        int | None, typer.Option(help="Threads to compute with. Default: the fastest number, by measurement.", min=1)
    ] = None,
) -> None:
    """Run long prompts at once in too little memory for full attention, and watch layers being converted."""
    budget = parse_bytes(memory, "--memory") if memory is not None else None
    make_folder(out)
    from dsla.adaptive import make_policy
    from dsla.bench.demo import Demo
    from dsla.bench.streams import Need, Stream, load_books
    from dsla.cli.demo_view import View
    from dsla.engine import Engine
    from dsla.server.build import EngineSettings, build_engine

    typer.echo(f"Loading {model or 'the default model'}")
    service = build_engine(EngineSettings(model=model, adapter=adapter, threads=threads))
    _check_adapter(service)
    decoder = service.engine.decoder
    chosen = [Stream.of(book, service.tokenizer, max_tokens, decoder.max_tokens) for book in load_books()[:streams]]
    need = Need.of(chosen, decoder, service.engine.arena)
    budget = budget or need.default_budget
    need.check(budget)
    engine = Engine(decoder, decoder.arena(budget), service.engine.config, make_policy())
    run = Demo(engine, service.tokenizer, chosen)
    view = View(run, need)
    view.open()
    try:
        with view:
            for sample in run.run():
                view.show(sample)
    except KeyboardInterrupt:
        typer.echo("Stopped: nothing was written")
        raise typer.Exit(130) from None
    _write(run, need, service.model_name, out)
    view.close(out)
    if not all(result.finished for result in run.results()):
        raise typer.Exit(1)


def _check_adapter(service: Service) -> None:
    """Checks that layers of running streams can be converted.

    Raises:
        AdapterError: there is no adapter, it holds no layer, or it is not foldable.
    """
    decoder = service.engine.decoder
    if service.adapter is None:
        raise AdapterError(
            f"the demo converts layers of {service.model_name}, which needs an adapter, and none ships with this model: "
            "make one with `dsla convert` and name it with --adapter"
        )
    if not decoder.order:
        raise AdapterError(f"adapter {service.adapter.path} holds no converted layer yet: finish its `dsla convert`")
    if not decoder.foldable:
        raise AdapterError(
            f"adapter {service.adapter.path} is not foldable (its gates read more than a KV cache keeps), so running "
            "streams would keep their level: name one made with gate_source=key"
        )


def _write(run: Demo, need: Need, model: str, out: Path) -> None:
    from dsla.bench.demo import record
    from dsla.bench.demo_plot import plot_demo
    from dsla.bench.records import write_record

    budget, top = run.engine.arena.budget_bytes, len(run.engine.decoder.order)
    try:
        write_record(record(run, need, model), out / "demo.json")
        plot_demo(run.samples, run.results(), budget, top, out / "demo.png")
    except OSError as error:
        raise ConfigError(f"cannot write to --out {out}: {error.strerror or error}") from None
