"""`dsla verify`: is an adapter whole, and does it belong to the model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")] = None,
) -> None:
    """Check hashes, shapes and values of an adapter, and run its model at level 0 and at the highest."""
    import torch

    from dsla.convert.check import check_adapter
    from dsla.convert.load import find_model

    for line in check_adapter(adapter, find_model(model)[0], torch.float32):
        typer.echo(line)
