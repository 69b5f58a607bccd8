"""Several processes against one: the same losses, the same weights, in parts and out of them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsla.convert.adapter import read_manifest
from dsla.distill import convert, parallel
from dsla.distill.recipe import StageSettings
from dsla.errors import ConfigError
from tests.distill.tiny import PLAN, RECIPE, TinyTokenizer, teacher, write_text

RECIPE = dataclasses.replace(
    RECIPE,
    train=dataclasses.replace(RECIPE.train, batch_tokens=128),
    stages=(StageSettings(tokens=768, seq_len=32, batch_tokens=192, valid_tokens=64, lr=0.003, tolerance=9.0),),
)

_CHILD = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dsla.distill import convert, parallel
from dsla.distill.data import Source
from dsla.distill.part import Part, TimeUp
from tests.distill.test_parallel import RECIPE
from tests.distill.tiny import PLAN, TinyTokenizer, teacher

text, out, minutes = sys.argv[1:]
parallel.join("cpu")
finished = False
while not finished:
    model = teacher()
    parallel.shard(model)
    shares = [p.to_local().numel() / p.numel() for p in model.model.layers.parameters()]
    assert sum(shares) / len(shares) < 0.6, "the teacher's layers are shared out"
    try:
        convert(model, TinyTokenizer(), PLAN, RECIPE, [Source(Path(text))], Path(out), part=Part(float(minutes)))
        finished = True
    except TimeUp as stop:
        print(stop)
parallel.leave()
"""


def run_processes(count: int, *arguments: object) -> str:
    """What the processes print."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "--no-python",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."]), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", _CHILD, *map(str, arguments)]
    result = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["inf", "0.0"], ids=["whole", "parts"])
def test_two_processes_train_what_one_trains(tmp_path: Path, minutes: str) -> None:
    (text,) = write_text(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    convert(teacher(), TinyTokenizer(), PLAN, RECIPE, [text], one)
    printed = run_processes(2, text.path, two, minutes)
    assert ("step 1 of" in printed) == (minutes == "0.0"), printed
    expected, found = read_manifest(one), read_manifest(two)
    for layer in PLAN.order:
        errors = [torch.tensor(manifest["layers"][str(layer)]["errors"]) for manifest in (expected, found)]
        torch.testing.assert_close(*errors, rtol=1e-4, atol=0.0)
    losses = [torch.tensor(manifest["stages"][0]["losses"]) for manifest in (expected, found)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0.0)
    assert expected["stages"][0]["kept"] and found["stages"][0]["kept"]
    for layer in PLAN.order:
        weights = [load_file(out / f"layer-{layer:02d}.nested.safetensors") for out in (one, two)]
        for name, tensor in weights[0].items():
            # Stored in bf16, whose last bit is 2^-8.
            torch.testing.assert_close(
                weights[1][name].float(), tensor.float(), rtol=1e-2, atol=2e-3, msg=f"{layer} {name}"
            )


def test_batches_must_have_rows_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.check_rows("train", 2048, 2048)
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    parallel.check_rows("train", 3 * 1024, 1024)
    with pytest.raises(
        ConfigError, match="recipe.train.batch_tokens is 4096, 4 rows of 1024: 3 processes need at least 6"
    ):
        parallel.check_rows("train", 4096, 1024, 2)


def test_rows_are_shared_out_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.arange(7)
    assert parallel.own(batch, 2).tolist() == list(range(7))
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    for rank, alone, pairs in ((0, [0, 3, 6], [0, 1, 6]), (1, [1, 4], [2, 3]), (2, [2, 5], [4, 5])):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        assert parallel.own(batch).tolist() == alone and parallel.own(batch, 2).tolist() == pairs


def test_a_certain_device_is_refused_to_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.join("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="'cuda:1' cannot be used by several processes"):
        parallel.join("cuda:1")
