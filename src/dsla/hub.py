"""Which folder a model name means, and which weights lie in it.

Three kinds of name: none (the default model, see `dsla.default_model`), a local folder, a name on the Hugging Face hub.
Weights are safetensors, always; pickled ones are refused, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from dsla.checkpoint import weight_files, weights_sha256
from dsla.default_model import SMOLLM2, damage, install
from dsla.errors import ModelError
from dsla.storage import write_json

DEFAULT_MODEL = SMOLLM2.name

_logger = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]


def cache_dir() -> Path:
    """The user's cache folder for this package: `$DSLA_HOME`, else `$XDG_CACHE_HOME/dsla`, else `~/.cache/dsla`."""
    home = os.environ.get("DSLA_HOME")
    if home:
        return Path(home).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dsla"


def must_fetch(name: str | Path | None) -> str | None:
    """Why `resolve_model` would fetch the default model first, as `config.json is missing`; None where it would not, or another
    model is meant."""
    if name is not None and str(name) != DEFAULT_MODEL:
        return None
    return damage(cache_dir() / "models" / DEFAULT_MODEL)


def resolve_model(name: str | Path | None = None, check: Callable[[Path], object] | None = None) -> Path:
    """The folder of a model, fetched if need be.

    Args:
        name: None or `smollm2-135m-instruct` for the default model, a local folder, or a hub name (`owner/model`).
        check: called with a folder that holds the `config.json` of a hub's model, before its weights are fetched; refuses it by
            raising.

    Returns:
        A folder with `config.json`, safetensors weights and, where the model has one, a tokenizer.

    Raises:
        ModelError: if there is no such model, it cannot be had, or its weights are damaged or not safetensors.
    """
    if name is None or str(name) == DEFAULT_MODEL:
        return install(cache_dir() / "models" / DEFAULT_MODEL)
    path = Path(name).expanduser()
    if path.is_dir():
        weight_files(path)
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; expected a model folder with config.json and *.safetensors")
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise ModelError(f"there is no model folder {str(path)!r}; give an existing folder or a hub name (owner/model)")
    path = _from_hub(name, check)
    weight_files(path)
    return path


def model_hash(path: Path) -> str:
    """Hex SHA-256 of a model's weights, as `dsla.checkpoint.weights_sha256` gives it.

    Computed once (about half a second a GB) and remembered in the cache folder while sizes and times of the files stay.

    Args:
        path: a model folder.

    Raises:
        ModelError: if the weights are missing or damaged.
    """
    files = weight_files(path)
    stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    memory = cache_dir() / "hashes" / f"{key}.json"
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        if remembered["files"] == stamps:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        _logger.debug("no remembered hash of %s", path)
    digest = weights_sha256(path)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {"path": str(path.resolve()), "files": stamps, "sha256": digest})
    except OSError as error:
        _logger.warning("cannot remember the hash of %s (%s): it is computed at each start", path, error)
    return digest


def _from_hub(name: str, check: Callable[[Path], object] | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if check is not None:
            check(Path(hf_hub_download(name, "config.json")).parent)
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no folder {name!r} and no public model {name!r} on the hub; check the name (owner/model), "
            "or log in with `hf auth login` if it is private"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name} is neither a folder nor in the hub's local cache, and the hub cannot be reached: "
            "check the network (and HF_HUB_OFFLINE), or give a model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot fetch {name} from the hub: {error}") from error
