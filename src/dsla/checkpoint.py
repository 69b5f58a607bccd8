"""The weights in a model folder: which files they are, whether they are whole, and a hash that names them.

Safetensors only. Where folders come from is the business of `dsla.hub` and `dsla.default_model`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dsla.errors import ModelError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a model is made of, checked to be whole.

    Args:
        folder: a model folder.

    Raises:
        ModelError: naming the first file that is missing, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; expected a model folder as transformers saves it")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({error}): fetch the model again") from None
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {pickled[0]}, and pickled weights can run code" if pickled else "no weights"
        raise ModelError(f"{folder}: expected model.safetensors (or its shards with an index), found {found}")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing, though {index.name} lists it: fetch the model again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error}): fetch the model again") from None
    return files


def weights_sha256(folder: Path) -> str:
    """Hex SHA-256 over names, types, shapes and values of a model's weights, in order of names.

    The same for the same weights whatever files they are spread over and whichever version wrote them.

    Args:
        folder: a model folder.

    Raises:
        ModelError: as `weight_files`.
    """
    import torch
    from safetensors import safe_open

    opened = [safe_open(file, framework="pt") for file in weight_files(folder)]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (not a dict)
    total = hashlib.sha256()
    for name in sorted(where):
        tensor = where[name].get_tensor(name)
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
