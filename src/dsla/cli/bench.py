"""`dsla bench`: how fast levels are by context, and what a server bears of a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.cli.checks import make_folder
from dsla.errors import ConfigError

if TYPE_CHECKING:
    from dsla.bench.replay import Server
    from dsla.bench.sweep import Run, Setting
    from dsla.bench.trace import Workload

bench = typer.Typer(
    help="Measure speed by level and context, and goodput under a trace of requests.", no_args_is_help=True
)

_Out = Annotated[Path, typer.Option(help="Folder for the record (JSON) and the picture.")]


@bench.command()
def crossover(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    levels: Annotated[
        str | None, typer.Option(help="Levels, as 0,8,15. Default: quarters of all. Level 0 is always among them.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Tokens, as 512,2048.")] = "512,1024,2048,4096,7936",
    batch: Annotated[int, typer.Option(help="Requests of a decode step.", min=1)] = 1,
    weights: Annotated[
        str | None, typer.Option(help="bf16, or int4: four bits, in groups of 32. Default: the model's own dtype.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads to compute with. Default: the fastest number, by measurement.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times everything is measured; medians count.", min=1)] = 3,
    out: _Out = Path("bench"),
) -> None:
    """Time prefill and decode by level and context, beside what memory bandwidth allows."""
    wanted = None if levels is None else _numbers(levels, "--levels")
    lengths = _numbers(contexts, "--contexts")
    make_folder(out)
    from dsla.bench.crossover import Grid, measure
    from dsla.bench.plots import plot_crossover
    from dsla.bench.records import write_record
    from dsla.cli.bench_view import show_crossover
    from dsla.cli.training import Bars, TimeLeft
    from dsla.server.build import EngineSettings, build_engine

    typer.echo(f"Loading {model or 'the default model'}")
    settings = EngineSettings(
        model=model, adapter=adapter, weights=weights, threads=threads, memory_bytes=_SMALL, adaptive=False
    )
    service = build_engine(settings)
    decoder = service.engine.decoder
    grid = Grid.of(decoder, wanted, lengths, batch, rounds)
    left = TimeLeft()
    with Bars() as bars:
        record = measure(decoder, grid, lambda done, parts: bars.overall("parts", done, parts, left(done, parts)))
    record["settings"]["model"] = service.model_name
    write_record(record, out / "crossover.json")
    plot_crossover(record, out / "crossover.png")
    show_crossover(record)
    typer.echo(f"Wrote {out / 'crossover.json'} and crossover.png")


@bench.command()
def serve(
    url: Annotated[str, typer.Argument(help="A server with OpenAI's API, as http://127.0.0.1:8000.")],
    trace: Annotated[
        list[Path], typer.Option(help="Trace: .jsonl (.gz, .zst) or Azure's .csv; repeatable. See docs/benchmarks.md.")
    ],
    rates: Annotated[
        str, typer.Option(help="Mean arrivals a second, as 0.5,1,2; with an x, times the trace's own, as 0.1x.")
    ] = "1x",
    requests: Annotated[int | None, typer.Option(help="Requests of each trace, at most. Default: all.", min=1)] = None,
    length_scale: Annotated[float, typer.Option(help="Factor for lengths of prompts and outputs.")] = 1.0,
    max_prompt: Annotated[
        int | None, typer.Option(help="Longest prompt; requests above are dropped and counted.", min=1)
    ] = None,
    max_output: Annotated[int | None, typer.Option(help="Longest output, likewise.", min=1)] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(help="Objective for the time to first token, seconds: what goodput counts.")
    ] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Objective for the time per further token, seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.", min=0)] = 0,
    vocabulary: Annotated[int, typer.Option(help="Token ids of prompts are 256 to below this.", min=257)] = 32_000,
    model: Annotated[str | None, typer.Option(help="Model to ask for. Default: the first the server lists.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key, where the server wants one.", envvar="DSLA_API_KEY")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds an answer may take before it counts as failed.")] = 600.0,
    out: _Out = Path("bench"),
) -> None:
    """Replay traces against a server at rising rates: latencies, throughput, goodput."""
    for option, value in (
        ("--slo-ttft", slo_ttft), ("--slo-tpot", slo_tpot), ("--timeout", timeout), ("--length-scale", length_scale)
    ):  # fmt: skip
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{option}: expected a number above 0, found {value}")
    import asyncio

    from dsla.bench.goodput import Objectives
    from dsla.bench.sweep import Rate, Setting, plan
    from dsla.bench.trace import fit, read_trace

    asked = tuple(dict.fromkeys(Rate.parse(text) for text in rates.split(",")))
    make_folder(out)
    read = {_trace_name(path): read_trace(path) for path in trace}
    if len(read) < len(trace):
        raise ConfigError("two of the traces have the same name, which tells them apart: rename one")
    try:
        from dsla.bench.replay import find_server

        server = asyncio.run(find_server(url, vocabulary, model, api_key, timeout))
    except ModuleNotFoundError as error:
        raise ConfigError(f"dsla bench serve needs {error.name}: pip install 'dsla[bench]'") from None
    limits = (max_prompt, max_output, server.max_tokens)
    workloads = {name: fit(rows, requests, length_scale, *limits) for name, rows in read.items()}
    setting = Setting(asked, Objectives(slo_ttft, slo_tpot), seed, vocabulary, timeout, length_scale, requests, limits)
    _say_what_comes(workloads, setting)
    runs = plan(workloads, asked)
    finished = _replay(server, runs, setting)
    if not any(run.outcomes for run in runs):
        typer.echo("Stopped: nothing was written")
        raise typer.Exit(130)
    _write(server, runs, setting, out)
    if not finished:
        raise typer.Exit(130)


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(help="serve.json of one server.")],
    second: Annotated[Path, typer.Argument(help="serve.json of another, with the same settings.")],
    out: Annotated[Path | None, typer.Option(help="Folder for a picture of both. Default: none.")] = None,
) -> None:
    """Show what two servers made of the same traces, side by side."""
    from dsla.bench.sweep import matched, read_record
    from dsla.cli.bench_view import show_comparison

    records = [read_record(path) for path in (first, second)]
    names = [path.stem if first.stem != second.stem else path.resolve().parent.name for path in (first, second)]
    show_comparison(names, matched(*records))
    if out is not None:
        from dsla.bench.plots import plot_sweeps

        make_folder(out)
        plot_sweeps(list(zip(names, records, strict=True)), out / "compare.png")
        typer.echo(f"Wrote {out / 'compare.png'}")


_SMALL = 16 << 20
"""Budget of an engine that is built for its decoder only."""


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: expected whole numbers as 0,8,15, found {text!r}") from None


def _trace_name(path: Path) -> str:
    return path.name.partition(".")[0]


def _say_what_comes(workloads: dict[str, Workload], setting: Setting) -> None:
    for name, workload in workloads.items():
        prompts = sum(request.prompt_tokens for request in workload.requests) / len(workload.requests)
        outputs = sum(request.output_tokens for request in workload.requests) / len(workload.requests)
        scale = f" (lengths times {setting.length_scale:g})" if setting.length_scale != 1 else ""
        typer.echo(
            f"{name}: {len(workload.requests):,} requests of {prompts:,.0f} prompt and {outputs:,.0f} output tokens on "
            f"average{scale}, {workload.rate:.3g} a second; {workload.dropped:,} longer than the limits were dropped"
        )


def _replay(server: Server, runs: list[Run], setting: Setting) -> bool:
    """Runs all; whether it came to the end before Ctrl-C."""
    import asyncio

    from dsla.bench.sweep import sweep
    from dsla.cli.training import Bars

    with Bars() as bars:

        def show(place: int, run: Run, open_requests: int) -> None:
            met = sum(outcome.meets(setting.objectives) for outcome in run.outcomes)
            done, total = len(run.outcomes), len(run.workload.requests)
            bars.overall("runs", place + (done == total), len(runs), "")
            name = f"{run.trace}, {run.rate:.3g}/s"
            bars.update(name, done, total, f"{open_requests} open, {met} of {done} in time")

        try:
            asyncio.run(sweep(server, runs, setting, show))
        except KeyboardInterrupt:
            return False
    return True


def _write(server: Server, runs: list[Run], setting: Setting, out: Path) -> None:
    from dsla.bench.plots import plot_sweeps
    from dsla.bench.records import write_record
    from dsla.bench.sweep import record
    from dsla.cli.bench_view import show_sweep

    data = record(server, runs, setting)
    write_record(data, out / "serve.json")
    plot_sweeps([(server.model, data)], out / "serve.png")
    show_sweep(data)
    typer.echo(f"Wrote {out / 'serve.json'} and serve.png")
