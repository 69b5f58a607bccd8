"""Reading what a model folder holds, for every command: config, tokenizer, weights, and all of it with levels in one call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from dsla.convert.adapter import Adapter, load_adapter
from dsla.errors import AdapterError, ConfigError, ModelError
from dsla.families import attention_shape, family_of
from dsla.hub import model_hash, resolve_model

_SHIPPED = Path(__file__).parent.parent / "adapters"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    level: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Loads a Hugging Face model whose layers can be converted, and its tokenizer.

    `model.dsla.set(level)` changes the level later, in the middle of a generation too.

    Args:
        model: folder or hub name of a supported model. Default: SmolLM2-135M-Instruct, fetched once.
        adapter: adapter folder. Default: the shipped one that belongs to the model's weights, if there is one.
        level: how many layers of the adapter's order are converted.
        dtype: of the weights. Default: the checkpoint's.
        device: where the model goes.

    Returns:
        The model (in evaluation mode) and the tokenizer.

    Raises:
        ModelError: if the model or its tokenizer cannot be had, is damaged, or its family is unknown.
        AdapterError: if the adapter is damaged, belongs to another model, or is missing for a level > 0.
        PlanError: if the level is out of range.
        ConfigError: if there is no such device.
    """
    from dsla.convert.surgery import Levels

    device = check_device(device)
    path, config = find_model(model)
    tokenizer = load_tokenizer(path)
    found = find_adapter(path, config, adapter, dtype or config.dtype or torch.float32, device)
    if found is None and level:
        raise AdapterError(
            f"level {level} needs an adapter, and none is shipped for this model: convert it with `dsla convert`"
        )
    net = load_model(path, dtype, device)
    if found is not None:
        net.dsla = Levels(net, found.plan, found.mixers)
        net.dsla.set(level)
    return net, tokenizer


def check_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it and tensors can be kept on it.

    Raises:
        ConfigError: otherwise.
    """
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here: {_reason(error)}") from None


def find_model(name: str | Path | None) -> tuple[Path, Any]:
    """Folder and Hugging Face config of a model of a supported family, fetched if need be.

    Args:
        name: as `dsla.hub.resolve_model` takes it; of a hub name the config is read before the weights are fetched.

    Raises:
        ModelError: if it cannot be had, or its family is unknown.
    """
    path = resolve_model(name, read_config)
    return path, read_config(path)


def read_config(path: Path) -> Any:
    """The Hugging Face config of a model folder.

    Raises:
        ModelError: if there is none, transformers does not know its type, or its family is not supported.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (transformers' strict configs raise types of their own)
        raise ModelError(f"{path} holds no config this version of transformers reads: {_reason(error)}") from None
    family_of(config)
    return config


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: if there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    # Without these files transformers makes an empty tokenizer of the class the config names.
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{path} holds no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError(f"{path} holds no tokenizer this version of transformers reads: {_reason(error)}") from error


def load_model(path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """The Hugging Face model of a folder, in evaluation mode.

    Its attention is PyTorch's SDPA, which is causal without a mask, as conversion calls it.

    Args:
        path: folder of a model of a supported family.
        dtype: of the weights. Default: the checkpoint's.
        device: where it goes.

    Raises:
        ModelError: if the family is unknown, or naming a tensor that is missing, misshapen or not the model's.
    """
    from transformers import AutoModelForCausalLM

    config, automatic = read_config(path), cast(Any, AutoModelForCausalLM)
    with _quiet(), _as_model_error(path):
        # Misshapen tensors do not stop it here: they are reported below, like missing ones, with their names.
        net, info = automatic.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(f"{path}: tensor {name!r} has shape {list(found)}, its config says {list(expected)}")
    for kind, problem in (("missing_keys", "is missing"), ("unexpected_keys", "does not belong to the config's model")):
        if names := sorted(info[kind]):
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ModelError(f"{path}: tensor {names[0]!r}{more} {problem}: fetch or save the model again")
    return net.to(device).eval()


def find_adapter(
    model: Path, config: Any, adapter: str | Path | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Adapter | None:
    """The named adapter, or the shipped one of the model's weights, or None.

    Args:
        model: the model's folder.
        config: its Hugging Face config.
        adapter: an adapter folder, or None for a shipped one.
        dtype: the model's.
        device: where the adapter's weights go.

    Raises:
        AdapterError: if it is damaged or belongs to another model.
    """
    digest, shape = model_hash(model), attention_shape(config)
    if adapter is not None:
        return load_adapter(Path(adapter), shape, digest, dtype, device)
    for plan in sorted(_SHIPPED.glob("*/plan.json")):
        if json.loads(plan.read_text(encoding="utf-8"))["teacher"]["sha256"] == digest:
            return load_adapter(plan.parent, shape, digest, dtype, device)
    return None


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    """What transformers raises for a folder it cannot load comes in many types."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {_reason(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bar and load report off the screen: what they say is checked."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
