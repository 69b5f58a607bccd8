"""`dsla fetch`: have a model in the cache before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer


def fetch(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.", show_default=False)
    ] = None,
) -> None:
    """Fetch a model if it is not in the cache yet, check it, and print its folder."""
    from dsla.hub import resolve_model

    typer.echo(resolve_model(model))
