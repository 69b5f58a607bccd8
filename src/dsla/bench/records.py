"""Records of measurements: what each says of where it comes from, and how it is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dsla import __version__
from dsla.storage import write_atomically

_PACKAGES = ("torch", "transformers")
_SECRET = "--api-key"


def origin() -> dict[str, Any]:
    """Date, command, commit, versions and machine of this process, as plain data.

    Returns:
        `commit` is None where the package does not lie in a git checkout of its own.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *map(_shown, sys.argv, sys.argv[1:])]),
        "commit": _commit(Path(__file__).parents[1]),
        "versions": {"dsla": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
    }


def write_record(data: dict[str, Any], path: Path) -> None:
    """Writes a record as JSON, atomically: a line for each member of its lists, floats with six digits.

    Raises:
        OSError: it cannot be written.
    """
    parts = []
    for name, value in _rounded(data).items():
        if isinstance(value, list):
            lines = ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value)
            parts.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _shown(before: str, argument: str) -> str:
    """An argument as a record shows it: of paths, their last part only; URLs as they are; no keys."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if _SECRET in (before, option) and value:
        return option + equals + "..."
    return option + equals + (Path(value).name if "/" in value and "://" not in value else value)


def _commit(folder: Path) -> str | None:
    """The commit that `folder` is checked out at, `-dirty` where its files were changed since."""

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return found.stdout.strip()

    # A package installed into somebody else's repository is not tracked there.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "__init__.py") else None
    return commit and commit + ("-dirty" if git("status", "--porcelain", ".") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _rounded(value: Any) -> Any:
    """The same with six digits of every float: a clock knows no more."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
