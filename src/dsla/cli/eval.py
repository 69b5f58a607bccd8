"""`dsla eval`: what is left of a model at each level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsla.errors import ConfigError

if TYPE_CHECKING:
    from dsla.evals.suites import Suite

_DTYPES = ("bfloat16", "float32", "float64")


def eval(
    out: Annotated[Path, typer.Option(help="Folder for the report. A run that was interrupted goes on from it.")],
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    levels: Annotated[
        str | None, typer.Option(help="Levels, as 0,8,15. Default: quarters of all. Level 0 is always among them.")
    ] = None,
    suite: Annotated[str, typer.Option(help="quick (minutes) or full (hours on a CPU).")] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with ppl/, mc/, long/, prompts/. Default: only tasks that need no files."),
    ] = None,
    states: Annotated[
        str, typer.Option(help="on, off (window and sinks alone), floor (no adapter), each (one left out); as on,off.")
    ] = "on",
    tasks: Annotated[
        str | None, typer.Option(help="Only these, as 'passkey/*,hellaswag'. Default: the suite's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task, at most.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(_DTYPES)}. Default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Score levels against the teacher, and write report.json, report.md and report.html."""
    import torch

    from dsla import __version__
    from dsla.cli.checks import make_folder
    from dsla.cli.progress import EvalProgress
    from dsla.cli.training import Bars, clock, find_teacher
    from dsla.convert.load import check_device, find_adapter, load_model, load_tokenizer
    from dsla.convert.surgery import Levels
    from dsla.evals import suites
    from dsla.evals.report import make_report, write_report
    from dsla.evals.runner import evaluate, seconds_left
    from dsla.evals.setting import chosen_settings
    from dsla.evals.speed import measure_speed, speeds_from_json, speeds_to_json
    from dsla.evals.store import Store, adapter_digest
    from dsla.evals.subject import Subject
    from dsla.families import context_length

    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype: expected {', '.join(_DTYPES)}, found {dtype!r}")
    place = check_device(device)
    path, config, teacher = find_teacher(model)
    kind = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    found = find_adapter(path, config, adapter, kind, place)
    settings = chosen_settings(
        _levels(levels, found.max_level if found else 0),
        states.split(","),
        found.max_level if found else None,
        found.plan.mixer.n_states if found else 0,
    )
    tokenizer = load_tokenizer(path)
    chosen = suites.suite(suite, data, tokenizer, context_length(config), limit)
    if tasks is not None:
        chosen = suites.choose(chosen, tasks.split(","))
    identity = {
        "model_sha256": teacher.sha256,
        "adapter": adapter_digest(found) if found else "",
        "suite": suite,
        "limit": limit,
        "files": chosen.files,
        "dtype": str(kind).removeprefix("torch."),
        "device": place.type,
    }
    make_folder(out)
    store = Store(out, identity)
    net = load_model(path, kind, place).requires_grad_(False)
    if found is not None:
        net.dsla = Levels(net, found.plan, found.mixers)
    subject = Subject(net, tokenizer)
    wanted = sorted({setting.level for setting in settings})
    speeds = speeds_from_json(store.speed)
    if not set(wanted) <= set(speeds):
        speeds = measure_speed(subject, wanted)
        store.keep_speed(speeds_to_json(speeds))
    _say_what_comes(chosen, len(settings), clock(seconds_left(chosen.tasks, settings, store, speeds)))
    with Bars() as bars:
        evaluate(subject, chosen.tasks, settings, store, speeds, EvalProgress(bars))
    about = {**identity, "model": teacher.name, "dsla": __version__, "torch": torch.__version__}
    report = make_report(subject, chosen.tasks, settings, store, speeds, about, chosen.left_out)
    write_report(report, store)
    _show(report, out)


def _levels(text: str | None, highest: int) -> list[int]:
    """The levels asked for; quarters of all where none are."""
    if text is None:
        return [int(highest * part / 4 + 0.5) for part in range(5)]
    try:
        return [int(level) for level in text.split(",")]
    except ValueError:
        raise ConfigError(f"--levels: expected numbers as 0,8,15, found {text!r}") from None


def _say_what_comes(chosen: Suite, settings: int, left: str) -> None:
    items = sum(task.items for task in chosen.tasks)
    typer.echo(f"{len(chosen.tasks)} tasks, {items:,} items, at {settings} settings: about {left}")
    silent = [task.name for task in chosen.tasks if not task.reads and not task.writes and task.group != "generation"]
    if silent:
        typer.echo(f"Not in this estimate: {', '.join(silent)}")


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from dsla.evals.tables import tables

    glance = tables(report)[0]
    table = Table(title=glance.title)
    for name in glance.head:
        table.add_column(name)
    for row in glance.rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Wrote {out / 'report.html'}, report.md and report.json", soft_wrap=True)
