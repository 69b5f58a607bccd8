"""Files that are either whole or not there: written beside their place, flushed, and renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary sibling of `path` and renames it into place once it is on disk.

    On any failure (a full disk, say) the previous file stays as it was and the sibling is removed.

    Args:
        path: the file to replace; its folder must exist.
        write: writes the whole file it is given.

    Raises:
        OSError: whatever writing raised.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's mask for new files, which some libraries do not heed."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented JSON, atomically."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk, too
            raise OSError(str(error)) from error

    write_atomically(path, write)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
