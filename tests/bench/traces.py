"""Small traces for tests: bursts, shared prefixes, and a request that is too long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS: tuple[dict[str, Any], ...] = (
    {"t_s": 10.0, "prompt_tokens": 1200, "output_tokens": 40, "hash_ids": [0, 1, 2]},
    {"t_s": 10.0, "prompt_tokens": 1100, "output_tokens": 60, "hash_ids": [0, 1, 3]},
    {"t_s": 10.5, "prompt_tokens": 90_000, "output_tokens": 10},
    {"t_s": 13.0, "prompt_tokens": 400, "output_tokens": 80, "hash_ids": [4]},
    {"t_s": 16.0, "prompt_tokens": 700, "output_tokens": 20},
)


def write_trace(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
