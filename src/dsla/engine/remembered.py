"""What was measured of a model on this machine, kept in the cache folder, so that a second start measures nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from dsla import __version__
from dsla.engine.decoder import PackedDecoder
from dsla.errors import EngineError
from dsla.hub import cache_dir
from dsla.ops import cpu
from dsla.ops.cpu import native
from dsla.storage import write_json

T = TypeVar("T")

_CPUINFO = Path("/proc/cpuinfo")
_log = logging.getLogger(__name__)


def facts_of(decoder: PackedDecoder) -> dict[str, Any]:
    """All that decides how long this model takes on this machine, but for the number of threads."""
    kernels = native(decoder.weights.norm.weight)
    mixer = decoder.mixers[decoder.order[0]].config if decoder.order else None
    return {
        "dsla": __version__,
        "torch": torch.__version__,
        "processor": processor(),
        "device": torch.cuda.get_device_name(decoder.device) if decoder.device.type == "cuda" else str(decoder.device),
        "sources": _sources(),
        "kernels": {"tiles": kernels.tiles} if kernels else None,
        "dtype": str(decoder.dtype),
        "int4": decoder.int4,
        "states": str(decoder.state_dtype),
        "shape": asdict(decoder.shape),
        "layers": decoder.n_layers,
        "converted": len(decoder.order),
        "mixer": asdict(mixer) if mixer else None,
        "vocabulary": decoder.vocab_size,
        "context": decoder.max_tokens,
        "bytes": decoder.nbytes,
    }


def remembered(
    kind: str,
    facts: Mapping[str, Any],
    measure: Callable[[], T],
    store: Callable[[T], Any],
    restore: Callable[[Any], T],
    sure: Callable[[T], bool] = lambda found: True,
) -> T:
    """What was measured under the same facts before, or else is measured now.

    Args:
        kind: what it is; part of the file's name.
        facts: JSON data; measured anew where any of it differs.
        measure: measures.
        store: turns what was measured into JSON data.
        restore: turns it back; raises EngineError, TypeError or ValueError where it is none of its own.
        sure: whether what was measured is to be remembered. Default: always.
    """
    text = json.dumps(facts, sort_keys=True)
    path = cache_dir() / "measured" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        try:
            return restore(json.loads(path.read_text(encoding="utf-8"))["measured"])
        except (OSError, ValueError, KeyError, TypeError, EngineError) as error:
            _log.warning("%s is damaged (%s: %s): measuring anew", path, type(error).__name__, error)
    found = measure()
    if not sure(found):
        _log.warning("%s were measured on a slow or busy machine: the next start measures them again", kind)
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"facts": dict(facts), "measured": store(found)})
    except OSError as error:
        _log.warning("cannot remember the %s in %s (%s): it is measured at each start", kind, path, error)
    return found


def processor() -> str:
    """Architecture and name of the processor."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{platform.machine()} {next(names, platform.processor())}"


def _sources() -> str:
    """Digest of what computes and measures, which changes between two releases."""
    digest, kernels = hashlib.sha256(), Path(cpu.__file__).parent
    for path in sorted([*kernels.glob("*.cpp"), *kernels.glob("*.h"), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
