"""Weights in a model folder: found, checked, hashed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsla.checkpoint import weight_files, weights_sha256
from dsla.errors import ModelError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(4, dtype=torch.bfloat16),
    "scale": torch.tensor(2.5),
}


def whole(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shards = {f"model-{i}.safetensors": {name: TENSORS[name]} for i, name in enumerate(TENSORS)}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_hash_is_of_the_weights_not_of_the_files(tmp_path: Path) -> None:
    one = whole(tmp_path / "one")
    digest = weights_sha256(one)
    assert digest == weights_sha256(sharded(tmp_path / "shards"))
    save_file(dict(reversed(TENSORS.items())), one / "model.safetensors", {"written": "by another version"})
    assert digest == weights_sha256(one)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"a": torch.ones(4, dtype=torch.bfloat16) * 2}, id="value"),
        pytest.param({"a": torch.ones(2, 2, dtype=torch.bfloat16)}, id="shape"),
        pytest.param({"a": torch.ones(4, dtype=torch.bfloat16).view(torch.float16)}, id="dtype"),
        pytest.param({"c": torch.zeros(1)}, id="name"),
    ],
)
def test_hash_changes_with(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    assert weights_sha256(whole(tmp_path / "a")) != weights_sha256(whole(tmp_path / "b", TENSORS | changed))


@pytest.mark.parametrize("keep", [0, 4, 60, -1], ids=lambda keep: f"{keep}-bytes")
def test_truncated_weights_are_named(tmp_path: Path, keep: int) -> None:
    file = whole(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged .*fetch the model again"):
        weight_files(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors is missing"):
        weight_files(folder)


def test_damaged_index_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text("[1, 2")
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        weight_files(folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"found only pytorch_model\.bin, and pickled weights can run code"):
        weight_files(tmp_path)


@pytest.mark.parametrize(("files", "message"), [((), "holds no config.json"), (("config.json",), "found no weights")])
def test_folder_that_is_no_model(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=message):
        weight_files(tmp_path)
