"""`dsla doctor`: what this machine can run, and what would make it faster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dsla.cli.options import Model
from dsla.cli.sizes import format_bytes

if TYPE_CHECKING:
    from dsla.cli.advice import Advice
    from dsla.cli.diagnosis import Facts, Kernels
    from dsla.engine.threads import Bounds

_PROBLEM = 1
_SHOWN = ("torch", "transformers")


def doctor(
    model: Model = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what this machine can run, and what would be better. Exit status: 0 all is well, 1 something would be better."""
    from rich.console import Console

    from dsla.cli.advice import advise
    from dsla.cli.diagnosis import find_facts

    with Console(stderr=True).status("Looking at this machine"):
        facts = find_facts(model, adapter)
    advice = advise(facts)
    if as_json:
        typer.echo(json.dumps({**asdict(facts), "advice": [asdict(each) for each in advice]}, indent=2))
    else:
        _show(facts, advice)
    if advice:
        raise typer.Exit(_PROBLEM)


def _show(facts: Facts, advice: list[Advice]) -> None:
    rows = [
        ("dsla", f"{facts.dsla}, Python {facts.python}, {facts.system}"),
        ("packages", _packages(facts)),
        ("processor", facts.processor),
        ("kernels", _kernels(facts.kernels)),
        ("gpu", _gpu(facts)),
        ("threads", _threads(facts.threads, facts.model.threads if facts.model else None)),
        ("malloc", "keeps what training frees" if facts.keeps_freed_memory else "gives back what training frees"),
        ("files", _files(facts.open_files)),
        *_memory(facts),
    ]
    width = max(len(name) for name, _ in rows)
    typer.echo("\n".join(f"  {name:<{width}}  {text}" for name, text in rows))
    if not advice:
        typer.echo("All is well.")
        return
    typer.echo("Would be better:")
    for each in advice:
        typer.echo(f"  {each.about:<{width}}  {each.found}\n  {'':<{width}}  -> {each.do}")


def _packages(facts: Facts) -> str:
    shown = [package for package in facts.packages if package.name in _SHOWN or not package.within]
    return ", ".join(f"{package.name} {package.version}" for package in shown)


def _kernels(kernels: Kernels) -> str:
    if not kernels.active:
        return f"PyTorch, with {kernels.pytorch}: {kernels.reason}"
    used = [name for name in kernels.instructions if name != "AMX" or kernels.tiles]
    refused = "; the system refuses AMX" if kernels.tiles_refused else ""
    return f"native, compiled by {kernels.compiler}, with {', '.join(used) or 'no vector instructions'}{refused}"


def _gpu(facts: Facts) -> str:
    gpus = facts.gpus
    triton = f"; Triton {gpus.triton} is installed, nothing here uses it" if gpus.triton else ""
    if gpus.devices:
        return f"{', '.join(gpus.devices)}: for training and evaluation; requests are served on the CPU so far{triton}"
    build = f"this PyTorch is built for CUDA {gpus.cuda}" if gpus.cuda else "this PyTorch is built without CUDA"
    return f"none that PyTorch can use ({build}){triton}"


def _threads(bounds: Bounds, used: int | None) -> str:
    limits = [f"{bounds.logical} logical and {bounds.physical} physical cores may be used"]
    if bounds.variable is not None:
        limits.append(f"OMP_NUM_THREADS={bounds.variable}")
    if bounds.quota is not None:
        limits.append(f"the control group grants the time of {bounds.quota}")
    tried = ", ".join(map(str, bounds.candidates))
    if used is None:
        return f"one of {tried}, by measurement ({'; '.join(limits)})"
    why = "the only number possible" if len(bounds.candidates) == 1 else f"the fastest of {tried}, as measured"
    return f"{used}: {why} ({'; '.join(limits)})"


def _files(most: int | None) -> str:
    if most is None:
        return "the system does not bound open files"
    return f"`dsla serve` may open {most:,}, one for each connection"


def _memory(facts: Facts) -> list[tuple[str, str]]:
    model, free = facts.model, facts.free_bytes
    memory = "the system does not say how much is free" if free is None else f"{format_bytes(free)} free"
    if model is None:
        return [("memory", memory), ("model", f"not in the cache yet ({facts.missing}): `dsla fetch` brings it")]
    budget = format_bytes(model.budget_bytes)
    if free is not None:
        memory += f"; `dsla serve` takes {budget} for requests, or what --memory says"
    held = " or ".join(f"{capacity.tokens:,} tokens at level {capacity.level}" for capacity in model.capacity)
    return [
        ("memory", memory),
        ("model", f"{model.name}, {model.dtype}: {budget} hold {held}, in requests of {model.context:,}"),
    ]
