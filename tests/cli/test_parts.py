"""`convert` and `refine` in parts, with an estimate before the start; and by several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsla.cli import training
from dsla.cli.app import build
from dsla.convert.adapter import layer_file, read_manifest
from dsla.distill import parallel
from dsla.errors import ConfigError
from tests.server.tiny import SAMPLE

RECIPE = """
mixer: {window: 4, sinks: 2, delta_rank: 3}
order: {metric: kl, windows: 2, seq_len: 32}
data: {seq_len: 32, tokens: 256, valid_tokens: 64}
train: {epochs: 1, batch_tokens: 64}
stages: [{tokens: 256, seq_len: 32, batch_tokens: 128, valid_tokens: 64, tolerance: 9.0}]
"""


@pytest.fixture
def given(folders: tuple[str, str], tiny_home: None, tmp_path: Path) -> list[str]:
    """Model, text and recipe, as arguments."""
    records = (json.dumps({"text": f"{i} {' '.join(SAMPLE) * 8}"}) for i in range(8))
    (tmp_path / "text.jsonl").write_text("\n".join(records), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return [folders[0], "--data", str(tmp_path / "text.jsonl"), "--recipe", str(tmp_path / "recipe.yaml")]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(build(["order", "convert", "refine"]), [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return " ".join(result.stdout.split())


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("layer-*")}


def test_estimate_comes_first_or_alone(given: list[str], tmp_path: Path) -> None:
    printed = run("convert", *given, "--out", tmp_path / "out", "--estimate")
    for phase in ("order by kl", "chain, inputs", "chain, training", "stage nested", "all"):
        assert phase in printed
    assert not (tmp_path / "out" / "plan.json").exists(), "nothing was begun"
    printed = run("convert", *given, "--out", tmp_path / "out")
    assert printed.index("estimate, from steps") < printed.index("held-out error")
    assert "FLOP/s" in printed[printed.index("held-out error") :]
    entry = read_manifest(tmp_path / "out")
    assert entry["layers"]["0"]["flop_per_second"] > 0 and entry["stages"][0]["tokens_per_second"] > 0
    assert "estimate, from" not in run("convert", *given, "--out", tmp_path / "out"), "nothing is left to do"


def test_parts_of_no_minutes_get_to_the_end(given: list[str], tmp_path: Path) -> None:
    run("convert", *given, "--out", tmp_path / "whole")
    out, ends = tmp_path / "parts", []
    while "Wrote" not in (printed := run("convert", *given, "--out", out, "--minutes", 0)):
        ends.append(printed[printed.index("Stopped after") :])
    assert ends[0] == (
        "Stopped after 0 minutes, as asked: 0 of 4 layers are finished; 1 layers or sets of layers measured for the order. "
        "The same command goes on from there."
    )
    # A measurement each; four steps and the end of each layer; two steps and the end of the stage.
    assert len(ends) == 4 + 4 * 5 + 3
    assert "4 of 4 layers are finished; step 1 of 2 of stage nested" in ends[-3]
    assert weights(out) == weights(tmp_path / "whole")


def test_refine_in_parts(given: list[str], folders: tuple[str, str], tmp_path: Path) -> None:
    start = ["refine", *given, "--adapter", folders[1], "--out"]
    assert "stage nested" in run(*start, tmp_path / "whole", "--estimate")
    assert not (tmp_path / "whole" / "manifest.json").exists()
    run(*start, tmp_path / "whole")
    printed = [run(*start, tmp_path / "parts", "--minutes", 0) for _ in range(4)]
    assert ["Stopped after 0 minutes" in text for text in printed] == [True, True, True, False]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_several_processes_need_what_only_one_can_make(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(training, "begin_training", lambda device: device)
    runner = CliRunner()
    result = runner.invoke(build(["convert", "order"]), ["convert", *given, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigError) and "several processes need a plan" in str(result.exception)


@pytest.mark.slow
def test_two_processes_by_torchrun(given: list[str], tmp_path: Path) -> None:
    run("order", *given, "--out", tmp_path / "plan")
    given += ["--plan", str(tmp_path / "plan" / "plan.json")]
    run("convert", *given, "--out", tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "dsla.cli.app",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["convert", *given, "--out", str(tmp_path / "two")]
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("estimate, from steps") == 1, "one process prints"
    for name in (layer_file(layer, "nested") for layer in range(4)):
        assert (tmp_path / "two" / name).exists()
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    for layer, entry in one["layers"].items():
        assert two["layers"][layer]["errors"] == pytest.approx(entry["errors"], rel=1e-3)
