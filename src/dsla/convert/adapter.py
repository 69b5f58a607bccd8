"""The adapter: what conversion produced, kept next to the teacher's weights. A folder of JSON and safetensors, nothing else.

plan.json               order, scores, mixer settings, the teacher's name and hash
layer-NN*.safetensors   feature maps, deltas (bf16), gates and mixing weights (fp32) of one converted layer
manifest.json           name and hash of every layer file, and how it was made: data, tokens, losses, seeds, hardware, time
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsla.convert.plan import Plan
from dsla.errors import AdapterError, ConfigError, PlanError
from dsla.mixers import AttentionShape, DslaConfig, DslaMixer
from dsla.ops.shapes import state_dtype
from dsla.schema import from_data
from dsla.storage import sha256, write_json, write_tensors

FORMAT = 1
_FULL_PRECISION = ("gates.", "mixing.")


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        plan: its plan.
        mixers: layer -> mixer, in the plan's order; a prefix of it where conversion has not finished.
        path: where it was read from.
        sha256: one hash of all its layers.
    """

    plan: Plan
    mixers: dict[int, DslaMixer]
    path: Path
    sha256: str

    @property
    def max_level(self) -> int:
        """The highest level whose layers are all there."""
        return len(self.mixers)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(p.numel() * p.element_size() for mixer in self.mixers.values() for p in mixer.parameters())


def layer_file(layer: int, stage: str = "") -> str:
    """Name of the file of a layer's weights, as the chain or a later stage left them."""
    return f"layer-{layer:02d}{stage and '.' + stage}.safetensors"


def stored_weights(mixer: DslaMixer) -> dict[str, Tensor]:
    """A copy of a mixer's weights in the dtypes they are kept in: gates and mixing weights fp32, the rest bf16."""
    return {
        name: tensor.detach().to(torch.float32 if name.startswith(_FULL_PRECISION) else torch.bfloat16, copy=True)
        for name, tensor in mixer.state_dict().items()
    }


def save_layer(directory: Path, layer: int, mixer: DslaMixer, record: dict[str, Any]) -> None:
    """Adds a converted layer: its file first, then its entry in the manifest, each atomically.

    Args:
        directory: the adapter's folder; must exist.
        layer: layer index.
        mixer: the trained mixer.
        record: what the manifest says of how it was made.

    Raises:
        AdapterError: if the disk does not take it; what was there before stays valid.
    """
    path = directory / layer_file(layer)
    try:
        write_tensors(path, stored_weights(mixer))
        manifest = read_manifest(directory)
        manifest["mixer"] = dataclasses.asdict(mixer.config)
        manifest["layers"][str(layer)] = {"sha256": sha256(path), **record}
        write_json(directory / "manifest.json", manifest)
    except OSError as error:
        raise AdapterError(
            f"cannot save layer {layer} to {directory}: {error.strerror or error}; earlier layers are intact"
        ) from error


def save_stage(directory: Path, record: dict[str, Any], mixers: dict[int, DslaMixer]) -> None:
    """Puts the weights of a stage that trained several layers together in the place of those before it, all or none.

    Args:
        directory: the adapter's folder.
        record: what the manifest says of the stage; its `name` becomes part of the files' names.
        mixers: layer -> trained mixer; none if the stage's weights were not taken.

    Raises:
        AdapterError: if the disk does not take it; the adapter stays as it was.
    """
    try:
        manifest = read_manifest(directory)
        for layer, mixer in mixers.items():
            path = directory / layer_file(layer, record["name"])
            write_tensors(path, stored_weights(mixer))
            manifest["layers"][str(layer)] |= {"sha256": sha256(path), "file": path.name}
        manifest["stages"] = [*manifest.get("stages", []), record]
        write_json(directory / "manifest.json", manifest)
        for replaced in _unlisted(directory, manifest["layers"]):
            (directory / replaced).unlink()
    except OSError as error:
        raise AdapterError(
            f"cannot save stage {record['name']} to {directory}: {error.strerror or error}; the adapter is as it was"
        ) from error


def _unlisted(directory: Path, layers: dict[str, Any]) -> set[str]:
    listed = {listed_file(layer, entry) for layer, entry in layers.items()}
    return {file.name for file in directory.glob("layer-*.safetensors")} - listed


def listed_file(layer: str, entry: dict[str, Any]) -> str:
    """Name of the file that the manifest's entry of a layer stands for."""
    return str(entry.get("file", layer_file(int(layer))))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an adapter folder; a new, empty one where there is none.

    Raises:
        AdapterError: if it is damaged or of another format version.
    """
    path = directory / "manifest.json"
    if not path.exists():
        return {"format": FORMAT, "layers": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, layers = manifest["format"], manifest["layers"]
        hashes = {int(layer): entry["sha256"] for layer, entry in layers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} is damaged: {error!r}") from None
    if version != FORMAT or not all(isinstance(digest, str) for digest in hashes.values()):
        raise AdapterError(
            f"{path} has format version {version}, this dsla reads version {FORMAT}: convert the model again or update"
        )
    return manifest  # type: ignore[no-any-return]


def layers_hash(layers: dict[str, Any]) -> str:
    """One hash of all layers of an adapter, from its manifest's entries of them."""
    return hashlib.sha256("".join(entry["sha256"] for entry in layers.values()).encode()).hexdigest()


def load_adapter(
    directory: Path,
    shape: AttentionShape,
    teacher_sha256: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Adapter:
    """Reads an adapter and checks all of it against hashes, shapes and the teacher.

    Args:
        directory: the adapter's folder.
        shape: sizes of the teacher's attention layers.
        teacher_sha256: hash of the teacher's weights.
        dtype: the model's; deltas take it, everything else is fp32 (fp64 in an fp64 model).
        device: where the weights go.

    Returns:
        The adapter, its mixers in evaluation mode.

    Raises:
        AdapterError: naming the first thing wrong.
    """
    if not directory.is_dir():
        raise AdapterError(f"no adapter at {directory}")
    try:
        plan = Plan.load(directory / "plan.json")
    except PlanError as error:
        raise AdapterError(f"adapter {directory}: {error}") from None
    if plan.teacher.sha256 != teacher_sha256:
        raise AdapterError(
            f"adapter {directory} belongs to {plan.teacher.name} (weights {plan.teacher.sha256[:12]}), "
            f"not to this model (weights {teacher_sha256[:12]})"
        )
    layers = _checked_layers(directory, plan)
    mixers: dict[int, DslaMixer] = {}
    for layer in plan.order[: len(layers)]:
        mixer = DslaMixer(plan.mixer, shape)
        entry = layers[str(layer)]
        _load_layer(directory / listed_file(str(layer), entry), entry["sha256"], mixer)
        mixers[layer] = cast(mixer, dtype).to(device).eval().requires_grad_(False)
    return Adapter(plan, mixers, directory, layers_hash(layers))


def cast(mixer: DslaMixer, dtype: torch.dtype) -> DslaMixer:
    """Brings a mixer to the dtypes it runs in beside a model of `dtype`: deltas in it, the rest in the dtype of states."""
    mixer.to(state_dtype(dtype))
    mixer.q_delta.to(dtype)
    mixer.o_delta.to(dtype)
    return mixer


def _checked_layers(directory: Path, plan: Plan) -> dict[str, Any]:
    """Entries of the manifest, which must be a prefix of the plan's order and made with the plan's mixer."""
    if not (directory / "manifest.json").exists():
        raise AdapterError(f"{directory} has no manifest.json: it is no adapter, or only part of one")
    manifest = read_manifest(directory)
    layers: dict[str, Any] = manifest["layers"]
    if not layers:
        return layers
    try:
        trained = dataclasses.asdict(from_data(DslaConfig, manifest["mixer"], "mixer"))
    except (KeyError, ConfigError) as error:
        raise AdapterError(f"{directory}: manifest.json does not say which mixer was trained: {error}") from None
    for key, value in dataclasses.asdict(plan.mixer).items():
        if trained[key] != value:
            raise AdapterError(
                f"{directory}: plan.json was edited: mixer.{key} is {value!r}, trained was {trained[key]!r}"
            )
    for position, layer in enumerate(plan.order[: len(layers)]):
        if layers.get(str(layer), {}).get("position", position) != position or str(layer) not in layers:
            raise AdapterError(
                f"{directory}: plan.json or manifest.json was edited: place {position + 1} of the order is layer {layer}, "
                f"the manifest lists layers {', '.join(layers)}"
            )
    # A conversion under way may have written a layer it has not listed yet.
    unlisted = _unlisted(directory, layers)
    if len(layers) > len(plan.order) or (unlisted and not (directory / "progress").is_dir()):
        what = f"{min(unlisted)} is there but not listed" if unlisted else "more layers are listed than the plan orders"
        raise AdapterError(f"{directory}: plan.json or manifest.json was edited: {what}")
    return layers


def _load_layer(path: Path, digest: str, mixer: DslaMixer) -> None:
    if not path.exists():
        raise AdapterError(f"{path} is missing, though the manifest names it")
    found = sha256(path)
    if found != digest:
        raise AdapterError(
            f"{path} is damaged or was edited: its sha256 is {found[:12]}, the manifest says {digest[:12]}"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is no valid safetensors file: {error}") from None
    expected = mixer.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise AdapterError(f"{path} lacks tensor {name!r}")
        if tensors[name].shape != tensor.shape:
            raise AdapterError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise AdapterError(f"{path}: tensor {extra[0]!r} does not belong to this mixer")
    mixer.load_state_dict(tensors)
