"""What long runs of tests leave behind: a committed result says what was run, and what happened in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.record import origin


def report(name: str, result: dict[str, Any]) -> None:
    """Writes what was run to the folder `RESULTS_OUT` names, if it does."""
    if "RESULTS_OUT" in os.environ:
        text = json.dumps({"origin": origin(), **result}, indent=2)
        (Path(os.environ["RESULTS_OUT"]) / f"{name}.json").write_text(text + "\n")
