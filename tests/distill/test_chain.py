"""The chain: it lowers the error, trains what it says and nothing else, and survives being killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dsla.convert import load_adapter
from dsla.convert.adapter import layer_file, read_manifest
from dsla.distill import convert
from dsla.distill.activations import Activations
from dsla.distill.chain import Progress
from dsla.distill.data import Source
from dsla.distill.part import Part
from dsla.distill.report import plot_training
from dsla.errors import AdapterError, DataError, PlanError, TrainingError
from dsla.families import attention_shape
from dsla.mixers import DslaMixer
from tests.distill.tiny import PLAN, RECIPE, TEACHER, TinyTokenizer, teacher, write_text

_CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dsla.distill import convert
from dsla.distill.part import Part
from tests.distill.tiny import *
text, out = map(Path, sys.argv[1:])
convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [Source(text)], out, part=Part(checkpoint_seconds=0.0))
"""


@pytest.fixture
def text(tmp_path: Path) -> list[Source]:
    return write_text(tmp_path)


def weights(out: Path) -> dict[str, bytes]:
    return {layer_file(layer): (out / layer_file(layer)).read_bytes() for layer in PLAN.order}


def test_chain_trains_mixers_only_and_reports(text: list[Source], tmp_path: Path) -> None:
    model, seen = teacher(), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    convert(model, TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out", seen.append)

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
    assert manifest["made_from"]["seed"] == 5 and manifest["made_from"]["files"][0]["name"] == "text.jsonl"
    assert manifest["layers"]["1"]["tokens"] == 2 * 512 and manifest["layers"]["1"]["train"]["lr"] == 0.02
    assert not (tmp_path / "out" / "progress").exists()
    assert load_adapter(tmp_path / "out", attention_shape(model.config), TEACHER.sha256).max_level == 3
    plot_training(tmp_path / "out", tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_killed_at_any_moment_ends_in_the_same_weights(text: list[Source], tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CHILD, str(text[0].path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    kills = 0
    for wait in (0.0, 0.15, 0.4, None):
        child = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        if wait is None:
            assert child.wait() == 0
            break
        checkpoint = tmp_path / "killed" / "progress" / "layer.safetensors"
        while not checkpoint.exists() and child.poll() is None:
            time.sleep(0.001)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1, "every run ended before it could be killed"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_stopped_within_a_layer_ends_in_the_same_weights(text: list[Source], tmp_path: Path) -> None:
    """As above, at every kind of step, in one process."""
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "whole")

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
            convert(
                teacher(), TinyTokenizer(), PLAN, RECIPE, text, out, stop_at(*moment), part=Part(checkpoint_seconds=0.0)
            )
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, out)
    assert weights(out) == weights(tmp_path / "whole")


def test_partial_conversion_is_a_prefix(text: list[Source], tmp_path: Path) -> None:
    convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(RECIPE, layers=1), text, tmp_path / "one")
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "all")
    assert (tmp_path / "one" / layer_file(1)).read_bytes() == (tmp_path / "all" / layer_file(1)).read_bytes()


def test_finished_layers_bind_mixer_text_and_order_but_not_the_training_of_the_next(
    text: list[Source], tmp_path: Path
) -> None:
    out, short = tmp_path / "out", dataclasses.replace(RECIPE, layers=1)
    convert(teacher(), TinyTokenizer(), PLAN, short, text, out)
    first = (out / layer_file(1)).read_bytes()
    with pytest.raises(AdapterError, match=r"other settings \(seed\)"):
        convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(short, seed=6), text, out)
    with pytest.raises(AdapterError, match="another order"):
        convert(teacher(), TinyTokenizer(), dataclasses.replace(PLAN, order=(2, 1)), RECIPE, text, out)
    other = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, lr=0.01))
    convert(teacher(), TinyTokenizer(), PLAN, other, text, out)
    assert (out / layer_file(1)).read_bytes() == first
    layers = read_manifest(out)["layers"]
    assert [layers[str(i)]["train"]["lr"] for i in PLAN.order] == [0.02, 0.01, 0.01]
    with open(text[0].path, "a") as file:
        file.write('{"text": "More."}\n')
    with pytest.raises(AdapterError, match=r"other settings \(files\)"):
        convert(teacher(), TinyTokenizer(), PLAN, other, text, out)


def test_more_layers_may_be_asked_for_later_and_fewer_are_no_error(text: list[Source], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for layers, finished in ((1, 1), (2, 2), (1, 2), (0, 3)):
        convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(RECIPE, layers=layers), text, out)
        assert len(read_manifest(out)["layers"]) == finished
        assert load_adapter(out, attention_shape(teacher().config), TEACHER.sha256).plan.order == PLAN.order
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


def test_other_settings_within_a_layer_start_it_anew(text: list[Source], tmp_path: Path) -> None:
    other = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, epochs=1, lr=0.01))
    stop_after_checkpoint(text, tmp_path / "out")
    convert(teacher(), TinyTokenizer(), PLAN, other, text, tmp_path / "out")
    convert(teacher(), TinyTokenizer(), PLAN, other, text, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert len(read_manifest(tmp_path / "out")["layers"]["1"]["errors"]) == 8


def test_activations_keep_only_what_is_started_from() -> None:
    activations = Activations(teacher(), torch.randint(0, 128, (2, 8)).split(1))
    for layer in (0, 1, 2):
        activations.at(layer)
    activations.changed(1, [2])
    assert sorted(activations._at) == [1]
    activations.changed(0, [])
    assert not activations._at


def test_progress_folder_may_be_removed(text: list[Source], tmp_path: Path) -> None:
    stop_after_checkpoint(text, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "progress")
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out", part=Part(checkpoint_seconds=0.0))
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_plan_of_another_depth_is_refused(text: list[Source], tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, teacher=dataclasses.replace(TEACHER, n_layers=9), order=(8, 1))
    with pytest.raises(PlanError, match="for 9 layers, the model has 3"):
        convert(teacher(), TinyTokenizer(), plan, RECIPE, text, tmp_path / "out")
    with pytest.raises(PlanError, match="levels 0 to 3"):
        convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(RECIPE, layers=4), text, tmp_path / "out")


@pytest.mark.parametrize("step", [3, 15], ids=["middle", "last"])
def test_nan_gradient_names_layer_and_step_and_can_be_resumed(
    step: int, text: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = torch.Tensor.backward, []

    def poisoned(self: torch.Tensor) -> None:
        backward(self)
        calls.append(None)
        if len(calls) == step + 1:
            parameter = next(p for p in graph_leaves(self) if p.grad is not None)
            parameter.grad.fill_(torch.nan)  # type: ignore[union-attr]

    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    with pytest.raises(TrainingError, match=f"gradient's norm is nan at layer 1, step {step} of 16"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out", part=Part(checkpoint_seconds=0.0))
    monkeypatch.undo()
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out")
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def graph_leaves(loss: torch.Tensor) -> Iterator[torch.nn.Parameter]:
    """Parameters a loss was computed from."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            stack += [parent for parent, _ in node.next_functions]


def test_nan_loss_names_layer_and_step_and_keeps_finished_layers(
    text: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = DslaMixer.prefill

    def poisoned(self, x, q, k, v, *rest):  # type: ignore[no-untyped-def]
        y, memory = prefill(self, x, q, k, v, *rest)
        bad = self.q_delta.down.requires_grad and (tmp_path / "out" / layer_file(1)).exists()
        return (y * torch.nan if bad else y), memory

    monkeypatch.setattr(DslaMixer, "prefill", poisoned)
    with pytest.raises(TrainingError, match="layer 2, step 0"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out")
    monkeypatch.undo()
    assert load_adapter(tmp_path / "out", attention_shape(teacher().config), TEACHER.sha256).max_level == 1


def test_empty_data_and_unwritable_folders_are_errors(text: list[Source], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [Source(tmp_path / "empty.txt")], tmp_path / "out")
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out")
    with pytest.raises(AdapterError, match="cannot write to"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, text[0].path / "below-a-file")


class Stop(Exception):
    """Stands in for a kill."""


def stop_after_checkpoint(text: list[Source], out: Path) -> None:
    """Starts a conversion and ends it in the middle of its first layer."""

    def stop(progress: Progress) -> None:
        if progress.phase == "train" and progress.step == 5:
            raise Stop

    with pytest.raises(Stop):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, out, stop, part=Part(checkpoint_seconds=0.0))


def test_full_disk_at_a_checkpoint_is_an_error_and_can_be_resumed(
    text: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out", part=Part(checkpoint_seconds=0.0))
    monkeypatch.undo()
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out")
    assert load_adapter(tmp_path / "out", attention_shape(teacher().config), TEACHER.sha256).max_level == 3


def test_damaged_checkpoint_is_named(text: list[Source], tmp_path: Path) -> None:
    stop_after_checkpoint(text, tmp_path / "out")
    checkpoint = tmp_path / "out" / "progress" / "layer.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(TrainingError, match="damaged"):
        convert(teacher(), TinyTokenizer(), PLAN, RECIPE, text, tmp_path / "out")


def test_manifest_is_plain_json(text: list[Source], tmp_path: Path) -> None:
    convert(teacher(), TinyTokenizer(), PLAN, dataclasses.replace(RECIPE, layers=1), text, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["made_on"]["torch"] == torch.__version__
