"""What every committed result says of its origin."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import dsla
from dsla.convert.adapter import layers_hash, read_manifest

RESULTS = Path(__file__).parent / "results"
INSTRUCTIONS = {
    "avx2": ("AVX2", "avx2"),
    "avx512": ("AVX-512 (bfloat16)", "avx512_bf16"),
    "amx": ("AMX (bfloat16)", "amx_bf16"),
}
"""Kinds of processors whose speeds are kept apart: folder -> what kernels multiply with, and the processor's flag for it. The
later have the earlier too."""


def engine_results() -> Path:
    """Folder of the engine's speeds on processors as this one."""
    there = Path("/proc/cpuinfo").read_text().split()
    kinds = [kind for kind, (_, flag) in INSTRUCTIONS.items() if flag in there]
    return RESULTS / (kinds[-1] if kinds else platform.machine())


def origin() -> dict[str, Any]:
    """Commit, machine, versions, threads and command of this run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=True).stdout
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit + ("-dirty" if changed else ""),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dsla": dsla.__version__,
        },
        "command": _command(),
    }


def digest(adapter: Path) -> str:
    """One hash of all layers of an adapter."""
    return layers_hash(read_manifest(adapter)["layers"])


def _command() -> str:
    """What repeats this run: its own command, or pytest's for the one test that runs, whoever started the process it is in."""
    test = os.environ.get("PYTEST_CURRENT_TEST")
    if test is not None:
        return shlex.join(["pytest", "-m", "", test.rpartition(" ")[0]])
    return " ".join([Path(sys.argv[0]).name, *(Path(x).name if "/" in x else x for x in sys.argv[1:])])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
