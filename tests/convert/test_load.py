"""Reading a model folder: what is damaged or not supported is named before anything is computed with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig

import dsla
from dsla.convert.load import check_device, find_model, load_model, load_tokenizer, read_config
from dsla.errors import AdapterError, ConfigError, ModelError
from tests.server.tiny import save_model, tiny_model

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, empty_cache: Path) -> Path:
    return save_model(tmp_path / "model")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_weights_are_the_folders_and_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, _attn_implementation="eager")
    model = load_model(folder)
    assert "".join(capfd.readouterr()) == ""
    assert model.config._attn_implementation == "sdpa" and not model.training
    expected = tiny_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert load_model(folder, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY}' is missing"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "k_proj" in name], r"\(and 3 more\) is missing"),
        (lambda tensors: tensors.update({KEY: torch.zeros(5, 5)}), rf"{KEY}' has shape \[5, 5\], its config says \[12, 24\]"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), "'model.extra' does not belong"),
    ],
    ids=["missing", "several missing", "misshapen", "unexpected"],
)  # fmt: skip
def test_damaged_weights_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_weights(folder, change)
    with pytest.raises(ModelError, match=message):
        dsla.load(folder)
    assert "".join(capfd.readouterr()) == ""


def test_tied_head_and_old_rotary_buffers_are_no_damage(folder: Path) -> None:
    edit_weights(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    )
    load_model(folder)


@pytest.mark.parametrize("function", [read_config, find_model, load_model, dsla.load])
def test_unknown_family(folder: Path, function: Callable[[Path], object]) -> None:
    MambaConfig(num_hidden_layers=2).save_pretrained(folder)
    with pytest.raises(ModelError, match="family 'mamba' is not supported; supported families: llama"):
        function(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "holds no config"), ('{"model_type": "nonesuch"}', "nonesuch"), ("[]", "holds no config"),
     ('{"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.Config"}}', "holds no config")],
    ids=["damaged", "unheard of", "no mapping", "with code"],
)  # fmt: skip
def test_unreadable_config(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    (folder / "code.py").write_text("raise SystemExit('code of a model was run')")
    with pytest.raises(ModelError, match=message):
        read_config(folder)


def test_no_tokenizer_and_a_damaged_one(folder: Path) -> None:
    file = folder / "tokenizer.json"
    for content in ('{"version": "1.0"', '{"version": "1.0"}', '{"version": "1.0", "added_tokens": []}'):
        file.write_text(content)
        with pytest.raises(ModelError, match="tokenizer this version of transformers reads"):
            load_tokenizer(folder)
    file.unlink()
    # transformers makes a tokenizer of three tokens of this.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="holds no tokenizer: expected one of tokenizer.json"):
        dsla.load(folder)


@pytest.mark.parametrize("device", ["banana", "", "cuda:99", "meta"])
def test_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
        check_device(device)
    with pytest.raises(ConfigError, match="cannot be used"):
        dsla.load("/nowhere/at/all", device=device)


def test_device_that_is_there() -> None:
    assert check_device("cpu") == torch.device("cpu") == check_device(torch.device("cpu"))


def test_level_without_an_adapter(folder: Path) -> None:
    with pytest.raises(AdapterError, match="level 1 needs an adapter"):
        dsla.load(folder, level=1)
