"""The chain: it lowers the error, trains what it says and nothing else, and survives being killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsla.convert import load_adapter
from dsla.convert.adapter import layer_file, read_manifest
from dsla.distill import convert
from dsla.distill.chain import Progress
from dsla.distill.report import plot_training
from dsla.errors import AdapterError, DataError, TrainingError
from dsla.families import attention_shape
from dsla.mixers import DslaMixer
from tests.distill.tiny import PLAN, RECIPE, TEACHER, TEXT, TinyTokenizer, teacher

_CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dsla.distill import convert
from tests.distill.tiny import *
convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [Path(sys.argv[1])], Path(sys.argv[2]), checkpoint_seconds=0.0)
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def weights(out: Path) -> dict[str, bytes]:
    return {layer_file(layer): (out / layer_file(layer)).read_bytes() for layer in PLAN.order}


def test_chain_trains_mixers_only_and_reports(text: Path, tmp_path: Path) -> None:
    model, seen = teacher(), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    convert(model, TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "out", seen.append)

    manifest = read_manifest(tmp_path / "out")
    assert list(map(int, manifest["layers"])) == list(PLAN.order)
    for layer in PLAN.order:
        entry = manifest["layers"][str(layer)]
        assert len(entry["errors"]) == 16
        assert sum(entry["errors"][-4:]) < sum(entry["errors"][:4]), f"layer {layer} did not learn"
    for name, parameter in model.named_parameters():
        if "mixer" not in name:
            assert torch.equal(parameter, before[name]), f"{name} was changed"
    assert isinstance(seen[-1], Progress) and seen[-1].phase == "done" and seen[-1].position == 3
    assert manifest["made_from"]["recipe"]["seed"] == 5 and manifest["data_sha256"]["text.txt"]
    assert not (tmp_path / "out" / "progress").exists()
    assert load_adapter(tmp_path / "out", attention_shape(model.config), TEACHER.sha256).max_level == 3
    plot_training(tmp_path / "out", tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_killed_at_any_moment_ends_in_the_same_weights(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CHILD, str(text)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    kills = 0
    for wait in (0.0, 0.15, 0.4, None):
        child = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        if wait is None:
            assert child.wait() == 0
            break
        while not (tmp_path / "killed" / "progress").exists() and child.poll() is None:
            time.sleep(0.005)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1, "every run ended before it could be killed"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_stopped_within_a_layer_ends_in_the_same_weights(text: Path, tmp_path: Path) -> None:
    """As above, at every kind of step, in one process."""
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at(phase: str, position: int, step: int):  # type: ignore[no-untyped-def]
        def on_progress(progress: Progress) -> None:
            if (progress.phase, progress.position, progress.step) == (phase, position, step):
                raise Stop

        return on_progress

    out = tmp_path / "stopped"
    for moment in [
        ("train", 0, 1),
        ("train", 0, 9),
        ("done", 1, 0),
        ("inputs", 1, 8),
        ("train", 1, 16),
        ("train", 2, 5),
    ]:
        with pytest.raises(Stop):
            convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], out, stop_at(*moment), checkpoint_seconds=0.0)
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], out)
    assert weights(out) == weights(tmp_path / "whole")


def test_partial_conversion_is_a_prefix(text: Path, tmp_path: Path) -> None:
    convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(RECIPE, layers=1), [text], tmp_path / "one")
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "all")
    assert (tmp_path / "one" / layer_file(1)).read_bytes() == (tmp_path / "all" / layer_file(1)).read_bytes()


def test_another_recipe_in_the_same_folder_is_refused(text: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(RECIPE, layers=1)
    convert(teacher(), TinyTokenizer(), PLAN, short, [text], tmp_path / "out")
    with pytest.raises(AdapterError, match="another recipe"):
        convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(short, seed=6), [text], tmp_path / "out")


def test_nan_loss_names_layer_and_step_and_keeps_finished_layers(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = DslaMixer.prefill

    def poisoned(self, x, q, k, v, *rest):  # type: ignore[no-untyped-def]
        y, memory = prefill(self, x, q, k, v, *rest)
        bad = self.q_delta.down.requires_grad and (tmp_path / "out" / layer_file(1)).exists()
        return (y * torch.nan if bad else y), memory

    monkeypatch.setattr(DslaMixer, "prefill", poisoned)
    with pytest.raises(TrainingError, match="layer 2, step 0"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "out")
    monkeypatch.undo()
    assert load_adapter(tmp_path / "out", attention_shape(teacher().config), TEACHER.sha256).max_level == 1


def test_empty_data_and_unwritable_folders_are_errors(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [tmp_path / "empty.txt"], tmp_path / "out")
    with pytest.raises(AdapterError, match="cannot write to"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], text / "below-a-file")


def test_damaged_checkpoint_is_named(text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.phase == "train" and progress.step == 5:
            raise Stop

    with pytest.raises(Stop):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "out", stop, checkpoint_seconds=0.0)
    checkpoint = tmp_path / "out" / "progress" / "layer.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(TrainingError, match="damaged"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], tmp_path / "out")


def test_manifest_is_plain_json(text: Path, tmp_path: Path) -> None:
    convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(RECIPE, layers=1), [text], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["made_on"]["torch"] == torch.__version__
