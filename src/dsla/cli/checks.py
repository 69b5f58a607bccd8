"""Checks of what a command was given, before anything slow is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dsla.errors import ConfigError


def make_folder(path: Path, option: str = "--out") -> None:
    """Makes a folder for results, and sees that files can be written there.

    Args:
        path: the folder; may exist.
        option: how it was given, for messages.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written to: {error.strerror or error}; name another folder"
        ) from None
