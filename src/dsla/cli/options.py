"""Options that several commands have, with one help text each. Names and defaults are the commands' own."""

from __future__ import annotations

from typing import Annotated

import typer

_SOURCES = ".txt, .jsonl (.gz, .zst), .parquet or a folder; PATH=WEIGHT; teacher:TOKENS; repeatable."

TrainingData = Annotated[list[str], typer.Option(help=f"Training text: {_SOURCES}")]
MeasuredData = Annotated[list[str], typer.Option(help=f"Text to measure on: {_SOURCES}")]
Model = Annotated[str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Minutes = Annotated[
    float, typer.Option(min=0, help="Stop after about so many minutes; the same command goes on from there.")
]
Estimate = Annotated[bool, typer.Option("--estimate", help="Show how long it would take, and stop.")]
