"""Which folder a model name means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsla import hub
from dsla.checkpoint import weights_sha256
from dsla.errors import ModelError
from dsla.hub import DEFAULT_MODEL, cache_dir, model_hash, resolve_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "my-model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    save_file({"w": torch.ones(3)}, made / "model.safetensors")
    return made


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DSLA_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"DSLA_HOME": "~/c", "HOME": "/h"}, "/h/c"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dsla"),
        ({"HOME": "/h"}, "/h/.cache/dsla"),
        ({"HOME": "/h", "DSLA_HOME": "", "XDG_CACHE_HOME": ""}, "/h/.cache/dsla"),
    ],
    ids=["own", "own-in-home", "xdg", "home", "empty-is-unset"],
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("DSLA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL])
def test_default_model_is_installed_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path, name: str | None
) -> None:
    monkeypatch.setattr(hub, "install", lambda folder: folder)
    assert resolve_model(name) == empty_cache / "models" / DEFAULT_MODEL


@pytest.mark.parametrize("kind", [str, Path])
def test_local_folder(folder: Path, kind: type) -> None:
    assert resolve_model(kind(folder)) == folder


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/my-model") == folder


@pytest.mark.parametrize("name", ["./nowhere", "/no/where/at/all", "a/b/c", "", "owner/na me"])
def test_unknown_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model folder|holds no config"):
        resolve_model(name)


def test_file_in_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file; expected a model folder"):
        resolve_model(folder / "model.safetensors")


def test_hub_name_takes_weights_without_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, list[str]] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("owner/model-1.5") == folder
    assert not [
        pattern
        for pattern in asked["owner/model-1.5"]
        if pattern.endswith((".py", ".bin", "*")) and pattern not in ("tokenizer*", "chat_template*")
    ]


def test_hub_model_is_checked_before_its_weights_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(path: Path) -> None:
        assert path == folder
        raise ModelError("not this one")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("weights were fetched")
    )
    with pytest.raises(ModelError, match="not this one"):
        resolve_model("owner/model", refuse)


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"owner/nothing is neither a folder nor in the hub's local cache.*network"):
        resolve_model("owner/nothing")


def test_hash_is_remembered_until_the_file_changes(
    folder: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model_hash(folder)
    assert first == weights_sha256(folder)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "weights_sha256", lambda path: pytest.fail("computed again"))
        assert model_hash(folder) == first
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(0, 0))
    assert model_hash(folder) == weights_sha256(folder) != first


def test_damaged_memory_of_a_hash_is_made_good(folder: Path, empty_cache: Path) -> None:
    first = model_hash(folder)
    (memory,) = (empty_cache / "hashes").iterdir()
    memory.write_text("{")
    assert model_hash(folder) == first


def test_hash_without_a_cache_is_still_a_hash(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSLA_HOME", str(tmp_path / "file"))
    assert model_hash(folder) == weights_sha256(folder)
    assert "cannot remember the hash" in caplog.text
