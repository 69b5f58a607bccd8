"""`refine`, and `convert` with stages: a tiny model, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsla.cli.app import build
from dsla.convert.adapter import read_manifest
from dsla.errors import AdapterError, ConfigError, DataError, DslaError
from tests.server.tiny import SAMPLE, save_model

CHAIN = """
mixer: {window: 4, sinks: 2, delta_rank: 3}
order: {metric: kl, windows: 2, seq_len: 32}
data: {seq_len: 32, tokens: 256, valid_tokens: 64}
train: {epochs: 1, batch_tokens: 64}
"""
STAGES = """
stages:
  - {name: nested, tokens: 256, seq_len: 64, batch_tokens: 128, valid_tokens: 128, lr: 0.0001, checks: 2, tolerance: 1.0}
  - {name: long, tokens: 256, seq_len: 128, batch_tokens: 128, valid_tokens: 128, lr: 0.0001, checks: 2, tolerance: 1.0}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSLA_HOME", str(folder / "home"))
        save_model(folder / "model")
        records = (json.dumps({"text": f"{i} {' '.join(SAMPLE) * 8}"}) for i in range(8))
        (folder / "text.jsonl").write_text("\n".join(records), encoding="utf-8")
        (folder / "chain.yaml").write_text(CHAIN)
        (folder / "stages.yaml").write_text(STAGES)
        (folder / "all.yaml").write_text(CHAIN + STAGES)
        arguments = ["--data", folder / "text.jsonl", "--recipe", folder / "chain.yaml", "--out", folder / "adapter"]
        assert run("convert", folder / "model", *arguments).exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def _home(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLA_HOME", str(base / "home"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build(["convert", "refine", "verify"]), [str(argument) for argument in arguments])


def refine(base: Path, out: Path, *arguments: object, recipe: str = "stages.yaml") -> Result:
    common = ["--data", base / "text.jsonl", "--recipe", base / recipe, "--out", out]
    return run("refine", base / "model", *common, *arguments)


def layers(adapter: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(adapter.glob("layer-*"))}


def test_refine_makes_a_new_adapter_and_leaves_the_old_one(base: Path, tmp_path: Path) -> None:
    before = layers(base / "adapter")
    result = refine(base, tmp_path / "new", "--adapter", base / "adapter")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "stage nested, held-out text: kept" in result.stdout and "stage long, held-out text: kept" in result.stdout
    assert f"check it with `dsla verify {tmp_path / 'new'}`" in result.stdout
    assert layers(base / "adapter") == before
    assert list(layers(tmp_path / "new")) == [f"layer-{i:02d}.long.safetensors" for i in range(4)]
    records = read_manifest(tmp_path / "new")["stages"]
    assert [record["name"] for record in records] == ["nested", "long"]
    assert records[0]["files"][0]["name"] == "text.jsonl" and records[0]["order"] and len(records[0]["losses"]) >= 1
    assert not (tmp_path / "new" / "progress").exists()
    result = run("verify", tmp_path / "new", "--model", base / "model")
    assert result.exit_code == 0 and "4 of 4 in the plan: hashes and shapes match" in result.stdout

    kept = layers(tmp_path / "new")
    again = refine(base, tmp_path / "new")
    assert again.exit_code == 0 and "All stages were finished before: nothing was trained" in again.stdout
    assert layers(tmp_path / "new") == kept


def test_convert_runs_the_stages_of_its_recipe(base: Path, tmp_path: Path) -> None:
    arguments = ["--data", base / "text.jsonl", "--recipe", base / "all.yaml", "--out", tmp_path / "adapter"]
    result = run("convert", base / "model", *arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "stage long, held-out text: kept" in result.stdout
    refined = refine(base, tmp_path / "new", "--adapter", base / "adapter")
    assert refined.exit_code == 0
    assert layers(tmp_path / "adapter") == layers(tmp_path / "new"), "the same stages on the same chain"
    assert "nothing was trained" in run("convert", base / "model", *arguments).stdout


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("chain.yaml", ConfigError, "names no stages"),
        ("{stages: [{name: A}]}", ConfigError, "a name is made of small letters"),
        ("{stages: [{name: a, tokens: 64, seq_len: 128}]}", ConfigError, "must be at least seq_len"),
        ("{stages: [{name: a, lr: 0.0}]}", ConfigError, "lr and grad_clip must be above 0"),
        ("{stages: [{name: a, on_policy: 2.0}]}", ConfigError, "shares, from 0 to 1"),
        ("{stages: [{name: a}, {name: a}]}", ConfigError, "two stages have the name 'a'"),
        (
            "{stages: [{name: a, seq_len: 65536, tokens: 65536, batch_tokens: 65536, valid_tokens: 65536}]}",
            ConfigError,
            "the model's context is",
        ),
        ("{stages: [{name: a, seq_len: 64, batch_tokens: 64, valid_tokens: 64}]}", DataError, "tokens"),
    ],
)
def test_bad_stages_are_refused(base: Path, tmp_path: Path, recipe: str, error: type[DslaError], message: str) -> None:
    if not recipe.endswith(".yaml"):
        (base / "bad.yaml").write_text(recipe)
        recipe = "bad.yaml"
    result = refine(base, tmp_path / "new", "--adapter", base / "adapter", recipe=recipe)
    assert isinstance(result.exception, error), f"{result.output}\n{result.exception!r}"
    assert message in str(result.exception)


def test_without_an_adapter_for_the_model_it_says_what_to_do(base: Path, tmp_path: Path) -> None:
    result = refine(base, tmp_path / "new")
    assert isinstance(result.exception, AdapterError) and "make one with `dsla convert`" in str(result.exception)
