"""`order`, `convert` and `verify` on a tiny model, end to end, and then the adapter in use."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import MambaConfig
from typer.testing import CliRunner, Result

import dsla
from dsla.cli.app import build
from dsla.convert.adapter import layer_file
from dsla.errors import AdapterError, ConfigError, DataError, DslaError, ModelError, PlanError
from dsla.hub import model_hash
from tests.server.tiny import SAMPLE, save_model

RECIPE = """
mixer: {window: 4, sinks: 2, delta_rank: 3}
order: {windows: 2, seq_len: 32}
data: {seq_len: 32, tokens: 256, valid_tokens: 64}
train: {epochs: 1, batch_tokens: 64}
"""
SMALL = {"order": {"windows": 2, "seq_len": 32}, "data": {"seq_len": 32, "tokens": 256, "valid_tokens": 64}}
RECIPES = Path(__file__).parents[2] / "recipes"


def small(path: Path) -> str:
    """A committed recipe with less data and shorter training; its mixer and metric are as they are."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["order"] = recipe.get("order", {}) | SMALL["order"]
    recipe["data"] = SMALL["data"]
    recipe["train"] = recipe.get("train", {}) | {"epochs": 1, "batch_tokens": 64}
    return yaml.safe_dump(recipe)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSLA_HOME", str(folder / "home"))
        save_model(folder / "model")
    records = (json.dumps({"text": f"{i} {' '.join(SAMPLE) * 8}"}) for i in range(8))
    (folder / "text.jsonl").write_text("\n".join(records), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "paper.yaml").write_text(small(RECIPES / "paper.yaml"))
    return folder


@pytest.fixture(autouse=True)
def _home(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLA_HOME", str(base / "home"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        build(["order", "convert", "verify", "generate", "serve"]), [str(argument) for argument in arguments]
    )


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def fail(error: type[DslaError], message: str, *arguments: object) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, error), f"{result.output}\n{result.exception!r}"
    assert message in str(result.exception)


def test_order_convert_verify_load(base: Path, tmp_path: Path) -> None:
    common = ["--data", base / "text.jsonl", "--recipe", base / "recipe.yaml"]
    printed = succeed("order", base / "model", *common, "--out", tmp_path / "plan")
    assert "least sensitive first" in printed and "entropy: attention entropy (nats)" in printed
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert sorted(plan["order"]) == [0, 1, 2, 3]
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "sensitivity.png"}

    plan_file = tmp_path / "plan" / "plan.json"
    printed = succeed("convert", base / "model", *common, "--plan", plan_file, "--out", tmp_path / "adapter")
    for layer in plan["order"]:
        assert f"layer {layer:>3}  held-out error" in printed
    assert (tmp_path / "adapter" / "training.png").exists()
    printed = succeed("verify", tmp_path / "adapter", "--model", base / "model")
    assert "4 of 4 in the plan" in printed and "fold equals the live run" in printed
    assert "0 equals the teacher bit for bit, 4 gives finite logits" in printed

    model, tokenizer = dsla.load(base / "model", tmp_path / "adapter", level=4)
    ids = tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    converted = model(ids).logits
    model.dsla.set(0)
    assert not torch.equal(model(ids).logits, converted)


def test_without_a_plan_the_order_is_measured_and_kept(base: Path, tmp_path: Path) -> None:
    common = ["--data", base / "text.jsonl", "--recipe", base / "recipe.yaml", "--out", tmp_path / "adapter"]
    succeed("convert", base / "model", *common)
    before = (tmp_path / "adapter" / layer_file(0)).read_bytes()
    assert "nothing was trained" in succeed("convert", base / "model", *common)
    assert (tmp_path / "adapter" / layer_file(0)).read_bytes() == before, "a finished conversion is left as it is"
    plan = json.loads((tmp_path / "adapter" / "plan.json").read_text())
    assert set(plan["scores"]) == {"greedy", "entropy", "outliers", "retrieval"}


def test_metrics_are_asked_for_by_name(base: Path, tmp_path: Path) -> None:
    common = [
        base / "model",
        "--data",
        base / "text.jsonl",
        "--recipe",
        base / "recipe.yaml",
        "--out",
        tmp_path / "plan",
    ]
    succeed("order", *common, "--metric", "kl", "--also", "greedy", "--also", "random")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["metric"] == "kl"
    assert set(plan["scores"]) == {"kl", "greedy", "entropy", "outliers", "retrieval", "random"}
    assert min(plan["scores"]["greedy"]) == min(plan["scores"]["kl"]) == plan["scores"]["kl"][plan["order"][0]]
    fail(ConfigError, "recipe.order.metric must be one of kl, kl_worst, greedy", "order", *common, "--metric", "guess")
    fail(ConfigError, "found 'guess'", "order", *common, "--also", "guess")
    recall = tmp_path / "recall.yaml"
    recall.write_text(
        RECIPE.replace("order: {windows: 2,", "order: {windows: 2, recall_windows: 1, metric: kl_worst, also: [kl],")
    )
    succeed("order", *common[:3], "--recipe", recall, "--out", tmp_path / "recall")
    found = json.loads((tmp_path / "recall" / "plan.json").read_text())
    assert found["metric"] == "kl_worst"
    assert all(worst > mean > 0 for worst, mean in zip(found["scores"]["kl_worst"], found["scores"]["kl"], strict=True))
    assert found["scores"]["kl"] != plan["scores"]["kl"], "a window more"


def test_an_adapter_is_written_in_a_new_order(base: Path, tmp_path: Path) -> None:
    records = [json.dumps({"text": f"{i} " + " ".join(SAMPLE[::-1] if i % 2 else SAMPLE) * 20}) for i in range(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(records), encoding="utf-8")
    text = ["--data", tmp_path / "text.jsonl"]
    (tmp_path / "random.yaml").write_text(RECIPE.replace("order: {", "order: {metric: random, "))
    old, new = tmp_path / "old", tmp_path / "new"
    succeed("convert", base / "model", *text, "--recipe", tmp_path / "random.yaml", "--out", old)
    (tmp_path / "short.yaml").write_text("order: {windows: 2, seq_len: 32, candidates: 4}")
    again = [base / "model", *text, "--recipe", tmp_path / "short.yaml", "--adapter", old, "--metric", "greedy"]
    assert f"in this order to {new}" in " ".join(succeed("order", *again, "--out", new).split())
    before, after = (json.loads((folder / "plan.json").read_text()) for folder in (old, new))
    assert after["metric"] == "greedy_trained" and after["mixer"] == before["mixer"]
    assert before["order"] != after["order"], "or the rest proves nothing"
    assert "4 of 4 in the plan" in succeed("verify", new, "--model", base / "model")
    layers = json.loads((new / "manifest.json").read_text())["layers"]
    assert [int(layer) for layer in layers] == after["order"]
    assert [before["order"].index(layer) for layer in after["order"]] == [x["trained_at"] for x in layers.values()]

    ids = torch.arange(30).unsqueeze(0)
    model, _ = dsla.load(base / "model", old, level=4)
    moved, _ = dsla.load(base / "model", new, level=4)
    assert torch.equal(moved(ids).logits, model(ids).logits)
    fail(AdapterError, "holds an adapter already", "order", *again, "--out", new)
    fail(AdapterError, "holds an adapter already", "order", *again, "--out", old)

    (tmp_path / "two.yaml").write_text(RECIPE + "layers: 2\n")
    succeed("convert", base / "model", *text, "--recipe", tmp_path / "two.yaml", "--out", tmp_path / "part")
    again[again.index(old)] = tmp_path / "part"
    fail(AdapterError, "holds 2 of 4 layers, and only all of them", "order", *again, "--out", tmp_path / "x")


def test_text_of_the_teacher_is_written_once_and_mixed_with_other_text(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    data = ["--data", f"{base / 'text.jsonl'}=0.5", "--data", "teacher:1500=0.5"]
    common = [base / "model", *data, "--recipe", base / "recipe.yaml", "--out", out]
    succeed("convert", *common)
    files = json.loads((out / "manifest.json").read_text())["made_from"]["files"]
    assert [(file["name"], file["weight"]) for file in files] == [("text.jsonl", 0.5), ("teacher-text.jsonl", 0.5)]
    before = (out / "teacher-text.jsonl").stat().st_mtime_ns
    assert "nothing was trained" in succeed("convert", *common)
    assert (out / "teacher-text.jsonl").stat().st_mtime_ns == before
    common[2] = f"{base / 'text.jsonl'}=0.6"
    fail(AdapterError, "other settings (files)", "convert", *common)
    common[2] = str(base / "text.jsonl")
    fail(DataError, "text.jsonl has no weight, but other data has", "convert", *common)
    common[1:5] = ["--data", "teacher:200"]
    fail(DataError, "needs 320 tokens of the teacher, --data asks for teacher:200", "convert", *common)


def test_papers_layer_runs_through_the_chain(base: Path, tmp_path: Path) -> None:
    common = ["--data", base / "text.jsonl", "--recipe", base / "paper.yaml", "--out", tmp_path / "adapter"]
    succeed("convert", base / "model", *common)
    assert "not foldable" in succeed("verify", tmp_path / "adapter", "--model", base / "model")
    model, _ = dsla.load(base / "model", tmp_path / "adapter", level=4)
    assert model(torch.arange(20).unsqueeze(0)).logits.isfinite().all()


def test_bad_input_is_named(base: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\xfe\x80" * 100)
    fail(DataError, "empty", "convert", base / "model", "--data", tmp_path / "empty.txt", *out)
    fail(DataError, "binary", "convert", base / "model", "--data", tmp_path / "binary.txt", *out)
    fail(DataError, "the recipe needs", "convert", base / "model", "--data", base / "text.jsonl", *out)
    fail(ModelError, "", "convert", tmp_path / "no-model", "--data", base / "text.jsonl", *out)
    fail(AdapterError, "no adapter at", "verify", tmp_path / "nothing", "--model", base / "model")
    assert not (tmp_path / "out" / "manifest.json").exists()

    plan = {"teacher": {"name": "other", "sha256": "1" * 64, "n_layers": 4}, "order": [0]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    common = ["--data", base / "text.jsonl", "--recipe", base / "recipe.yaml", "--plan", tmp_path / "plan.json", *out]
    fail(PlanError, "was made for other", "convert", base / "model", *common)
    plan["order"] = [7]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    fail(PlanError, "layers 0 to 3", "convert", base / "model", *common)


@pytest.mark.parametrize("verb", ["order", "convert", "verify", "generate", "serve"])
@pytest.mark.parametrize("family", ["gpt_neox", "mamba"])
def test_unknown_family_is_named(base: Path, tmp_path: Path, verb: str, family: str) -> None:
    model, data = copy_model(base, tmp_path / "m"), ["--data", base / "text.jsonl", "--out", tmp_path / "out"]
    if family == "mamba":
        MambaConfig(num_hidden_layers=4).save_pretrained(model)
    else:
        config = json.loads((model / "config.json").read_text())
        config["model_type"], config["architectures"] = "gpt_neox", ["GPTNeoXForCausalLM"]
        (model / "config.json").write_text(json.dumps(config))
    arguments = {
        "order": [model, *data],
        "convert": [model, *data],
        "verify": [tmp_path, "--model", model],
        "generate": ["hello", "--model", model],
        "serve": [model, "--port", "0"],
    }[verb]
    fail(ModelError, f"'{family}' is not supported", verb, *arguments)


def copy_model(base: Path, to: Path) -> Path:
    to.mkdir()
    for file in (base / "model").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("verb", ["order", "convert"])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (DataError, "no training data at /nope", {"--data": "/nope"}),
        (DataError, "holds no .txt", {"--data": "EMPTY"}),
        (ConfigError, "device 'banana' cannot be used", {"--device": "banana"}),
        (ConfigError, "device 'cuda:99' cannot be used", {"--device": "cuda:99"}),
        (ConfigError, "cannot be written to", {"--out": "FILE/out"}),
        (ConfigError, "cannot be written to", {"--out": "FILE"}),
        (ConfigError, "cannot read recipe", {"--recipe": "EMPTY"}),
        (ConfigError, "train.lr must be", {"--recipe": "train: {lr: -1}"}),
        (ConfigError, "the model's context is 4096 tokens", {"--recipe": "order: {seq_len: 4097}"}),
        (ModelError, "no model folder", {"model": "/nope"}),
        (ModelError, "holds no tokenizer", {"model": "NO TOKENIZER"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_everything_given_is_checked_before_the_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str,
    error: type[DslaError], message: str, changed: dict[str, str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.modules["dsla.convert.load"], "load_model", lambda *a, **k: pytest.fail("it was loaded"))
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    given = {"model": base / "model", "--data": base / "text.jsonl", "--out": tmp_path / "out", "--device": "cpu"}
    for key, value in changed.items():
        if ":" in value and key == "--recipe":
            (tmp_path / "r.yaml").write_text(value)
            given[key] = tmp_path / "r.yaml"
        elif value == "NO TOKENIZER":
            given[key] = copy_model(base, tmp_path / "m")
            (tmp_path / "m" / "tokenizer.json").unlink()
        else:
            given[key] = tmp_path / value if value.isupper() or value == "FILE/out" else value
    model = given.pop("model")
    fail(error, message, verb, model, *(word for option in given.items() for word in option))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (PlanError, "is a folder: name the plan.json in it", ["--plan", "."]),
        (PlanError, "no plan at nowhere", ["--plan", "nowhere"]),
        (ConfigError, "recipe.layers is 9, but the model has 4 layers", ["--recipe", "layers.yaml"]),
        (ConfigError, "recipe.data.seq_len is 4097", ["--recipe", "long.yaml"]),
    ],
)
def test_what_a_conversion_is_given_is_checked_before_the_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: type[DslaError], message: str, options: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.modules["dsla.convert.load"], "load_model", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layers.yaml").write_text("layers: 9")
    (tmp_path / "long.yaml").write_text("data: {seq_len: 4097, valid_tokens: 4097}\ntrain: {batch_tokens: 4097}")
    fail(error, message, "convert", base / "model", "--data", base / "text.jsonl", "--out", tmp_path / "out", *options)


def test_context_of_the_model_does_not_bind_what_is_not_used(base: Path, tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(RECIPE.replace("order: {windows: 2, seq_len: 32}", "order: {seq_len: 9999}"))
    plan = json.dumps({"teacher": {"name": "tiny", "sha256": model_hash(base / "model"), "n_layers": 4}, "order": [1]})
    (tmp_path / "plan.json").write_text(plan)
    common = ["--data", base / "text.jsonl", "--recipe", tmp_path / "long.yaml", "--plan", tmp_path / "plan.json"]
    succeed("convert", base / "model", *common, "--out", tmp_path / "out")
