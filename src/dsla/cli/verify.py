"""`dsla verify`: is an adapter whole, and does it belong to the model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")] = None,
) -> None:
    """Check hashes, shapes and values of an adapter, and that level 0 and every converted layer compute."""
    import torch

    from dsla.convert.check import check_adapter
    from dsla.hub import resolve_model

    for line in check_adapter(adapter, resolve_model(model), torch.float32):
        typer.echo(line)
