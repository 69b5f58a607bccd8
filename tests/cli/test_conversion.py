"""`order`, `convert` and `verify` on a tiny model, end to end, and then the adapter in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import dsla
from dsla.cli.app import build
from dsla.convert.adapter import layer_file
from dsla.errors import AdapterError, DataError, DslaError, ModelError, PlanError
from tests.server.tiny import SAMPLE, save_model

RECIPE = """
mixer: {window: 4, sinks: 2, delta_rank: 3}
order: {windows: 2, seq_len: 32}
data: {seq_len: 32, tokens: 256, valid_tokens: 64}
train: {epochs: 1, batch_tokens: 64}
"""
PAPER = """
mixer: {feature_map: identity, normalizer: none, gate_source: hidden, gate_shape: vector, window: 0, sinks: 0,
        mixing: layer, delta_rank: 0, rope: false}
order: {metric: entropy, windows: 2, seq_len: 32}
data: {seq_len: 32, tokens: 256, valid_tokens: 64}
train: {epochs: 1, batch_tokens: 64, lr: 0.0001, gate_contrast: 0.1}
layers: 2
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSLA_HOME", str(folder / "home"))
        save_model(folder / "model")
    (folder / "text.txt").write_text(" ".join(SAMPLE) * 60, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "paper.yaml").write_text(PAPER)
    return folder


@pytest.fixture(autouse=True)
def _home(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLA_HOME", str(base / "home"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build(["order", "convert", "verify"]), [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def fail(error: type[DslaError], message: str, *arguments: object) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, error), f"{result.output}\n{result.exception!r}"
    assert message in str(result.exception)


def test_order_convert_verify_load(base: Path, tmp_path: Path) -> None:
    common = ["--data", base / "text.txt", "--recipe", base / "recipe.yaml"]
    printed = succeed("order", base / "model", *common, "--out", tmp_path / "plan")
    assert "least sensitive first" in printed and "entropy" in printed
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert sorted(plan["order"]) == [0, 1, 2, 3]
    assert (tmp_path / "plan" / "sensitivity.png").exists()

    plan_file = tmp_path / "plan" / "plan.json"
    printed = succeed("convert", base / "model", *common, "--plan", plan_file, "--out", tmp_path / "adapter")
    for layer in plan["order"]:
        assert f"layer {layer:>3}  held-out error" in printed
    assert (tmp_path / "adapter" / "training.png").exists()
    printed = succeed("verify", tmp_path / "adapter", "--model", base / "model")
    assert "4 of 4 in the plan" in printed and "fold equals the live run" in printed

    model, tokenizer = dsla.load(base / "model", tmp_path / "adapter", level=4)
    ids = tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    converted = model(ids).logits
    model.dsla.set(0)
    assert not torch.equal(model(ids).logits, converted)


def test_without_a_plan_the_order_is_measured_and_kept(base: Path, tmp_path: Path) -> None:
    common = ["--data", base / "text.txt", "--recipe", base / "recipe.yaml", "--out", tmp_path / "adapter"]
    succeed("convert", base / "model", *common)
    before = (tmp_path / "adapter" / layer_file(0)).read_bytes()
    succeed("convert", base / "model", *common)
    assert (tmp_path / "adapter" / layer_file(0)).read_bytes() == before, "a finished conversion is left as it is"
    plan = json.loads((tmp_path / "adapter" / "plan.json").read_text())
    assert set(plan["scores"]) == {"kl", "entropy"}


def test_papers_layer_runs_through_the_chain(base: Path, tmp_path: Path) -> None:
    common = ["--data", base / "text.txt", "--recipe", base / "paper.yaml", "--out", tmp_path / "adapter"]
    succeed("convert", base / "model", *common)
    assert "not foldable" in succeed("verify", tmp_path / "adapter", "--model", base / "model")
    model, _ = dsla.load(base / "model", tmp_path / "adapter", level=2)
    assert model(torch.arange(20).unsqueeze(0)).logits.isfinite().all()


def test_bad_input_is_named(base: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\xfe\x80" * 100)
    fail(DataError, "empty", "convert", base / "model", "--data", tmp_path / "empty.txt", *out)
    fail(DataError, "binary", "convert", base / "model", "--data", tmp_path / "binary.txt", *out)
    fail(DataError, "the recipe needs", "convert", base / "model", "--data", base / "text.txt", *out)
    fail(ModelError, "", "convert", tmp_path / "no-model", "--data", base / "text.txt", *out)
    fail(AdapterError, "no adapter at", "verify", tmp_path / "nothing", "--model", base / "model")
    assert not (tmp_path / "out" / "manifest.json").exists()

    plan = {"teacher": {"name": "other", "sha256": "1" * 64, "n_layers": 4}, "order": [0]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    common = ["--data", base / "text.txt", "--recipe", base / "recipe.yaml", "--plan", tmp_path / "plan.json", *out]
    fail(PlanError, "was made for other", "convert", base / "model", *common)
    plan["order"] = [7]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    fail(PlanError, "layers 0 to 3", "convert", base / "model", *common)


def test_unknown_family_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for file in (base / "model").iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["model_type"], config["architectures"] = "gpt_neox", ["GPTNeoXForCausalLM"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    fail(ModelError, "'gpt_neox' is not supported", "order", tmp_path / "m", "--data", base / "text.txt")
