"""Adapters on disk: what is saved comes back, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dsla.convert.adapter import layer_file, load_adapter, save_layer, stored_weights
from dsla.convert.plan import Plan, Teacher
from dsla.errors import AdapterError
from dsla.mixers import AttentionShape, DslaConfig, DslaMixer

SHAPE = AttentionShape(hidden_size=24, n_heads=4, n_kv_heads=2, head_dim=6)
CONFIG = DslaConfig(window=4, sinks=2, delta_rank=3)
TEACHER = Teacher("tiny", "0" * 64, 4)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    Plan(TEACHER, (2, 0, 3), CONFIG).save(tmp_path / "plan.json")
    for position, layer in enumerate((2, 0)):
        torch.manual_seed(layer)
        save_layer(tmp_path, layer, DslaMixer(CONFIG, SHAPE), {"position": position, "errors": [0.5]})
    return tmp_path


def load(path: Path, digest: str = "0" * 64, shape: AttentionShape = SHAPE) -> dict[int, DslaMixer]:
    return load_adapter(path, shape, digest, torch.float32).mixers


def test_what_was_saved_comes_back(adapter: Path) -> None:
    mixers = load(adapter)
    assert list(mixers) == [2, 0], "layers that are not there yet end the prefix"
    torch.manual_seed(2)
    expected = stored_weights(DslaMixer(CONFIG, SHAPE))
    for name, tensor in mixers[2].state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_deltas_take_the_models_dtype_and_gates_stay_full(adapter: Path) -> None:
    mixer = load_adapter(adapter, SHAPE, "0" * 64, torch.bfloat16).mixers[2]
    assert mixer.q_delta.down.dtype == torch.bfloat16
    assert mixer.gates.weight.dtype == torch.float32 and mixer.mixing.bias.dtype == torch.float32


def edit(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def retrained(directory: Path, **settings: object) -> None:
    """Changes mixer settings everywhere they stand, as if the layers had been trained so."""
    edit(directory / "plan.json", lambda p: p["mixer"].update(settings))
    edit(directory / "manifest.json", lambda m: m["mixer"].update(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / layer_file(2)).write_bytes((d / layer_file(2)).read_bytes()[:-7]), "damaged or was edited"),
        (lambda d: (d / layer_file(0)).write_bytes((d / layer_file(2)).read_bytes()), "damaged or was edited"),
        (lambda d: (d / layer_file(2)).unlink(), "is missing"),
        (lambda d: (d / "plan.json").unlink(), "no plan"),
        (lambda d: (d / "plan.json").write_text("{"), "not valid JSON"),
        (lambda d: edit(d / "plan.json", lambda p: p["order"].append(4)), "layers 0 to 3"),
        (lambda d: edit(d / "plan.json", lambda p: p["order"].append(2)), "twice"),
        (lambda d: edit(d / "plan.json", lambda p: p.update(surprise=1)), "unknown key 'surprise'"),
        (lambda d: edit(d / "plan.json", lambda p: p["mixer"].update(window="big")), "window: expected int"),
        (lambda d: retrained(d, delta_rank=5), "has shape"),
        (lambda d: retrained(d, mixing="head"), "does not belong"),
        (lambda d: edit(d / "manifest.json", lambda m: m.update(format=2)), "format version 2"),
        (lambda d: edit(d / "manifest.json", lambda m: m.pop("layers")), "damaged"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda d: (d / "manifest.json").unlink(), "no manifest"),
        (lambda d: edit(d / "manifest.json", lambda m: m["layers"].pop("2")), "place 1 of the order is layer 2"),
        (lambda d: edit(d / "plan.json", lambda p: p["order"].reverse()), "place 1 of the order is layer 3"),
        (lambda d: edit(d / "plan.json", lambda p: p["mixer"].update(window=3)), "mixer.window is 3, trained was 4"),
        (lambda d: edit(d / "plan.json", lambda p: p.update(order=[])), "names no layer"),
        (lambda d: edit(d / "plan.json", lambda p: p.update(order=[2])), "more layers are listed"),
        (lambda d: edit(d / "manifest.json", lambda m: m["layers"].pop("0")), "layer-00.safetensors is there but not"),
        (lambda d: edit(d / "manifest.json", lambda m: m.pop("mixer")), "which mixer was trained"),
        (lambda d: edit(d / "manifest.json", lambda m: m.update(mixer=None)), "which mixer was trained"),
    ],
    ids=[
        "truncated", "swapped", "missing", "no plan", "broken plan", "no such layer", "layer twice", "unknown key",
        "wrong type", "wrong shape", "extra tensor", "newer version", "no layers", "binary manifest", "no manifest",
        "gap", "order edited", "mixer edited", "empty order", "short order", "entry removed", "no mixer", "null mixer",
    ],
)  # fmt: skip
def test_damage_is_named(adapter: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        load(adapter)


def test_adapter_of_another_model_is_refused(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="belongs to tiny"):
        load(adapter, "1" * 64)
    with pytest.raises(AdapterError, match="no adapter at"):
        load(adapter / "nowhere")


def test_edited_weights_with_a_matching_hash_are_checked_by_shape(adapter: Path) -> None:
    from dsla.storage import sha256, write_tensors

    write_tensors(adapter / layer_file(2), {"gates.weight": torch.zeros(1)})
    edit(adapter / "manifest.json", lambda m: m["layers"]["2"].update(sha256=sha256(adapter / layer_file(2))))
    with pytest.raises(AdapterError, match="lacks tensor|has shape"):
        load(adapter)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("dsla.storage.os.fsync", OSError(28, "No space left on device")),
        ("safetensors.torch.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
    ids=["fsync", "safetensors"],
)
def test_full_disk_keeps_what_was_there(
    where: str, error: Exception, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in load(adapter)[2].state_dict().items()}

    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(where, full)
    with pytest.raises(AdapterError, match="No space left"):
        save_layer(adapter, 2, DslaMixer(CONFIG, SHAPE), {})
    monkeypatch.undo()
    after = load(adapter)[2].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(adapter.glob(".*.tmp")), "temporary files were left behind"
