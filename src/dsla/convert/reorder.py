"""An adapter's files in another folder, in the same order or in another."""

from __future__ import annotations

import shutil
from pathlib import Path

from dsla.convert.adapter import Adapter, listed_file, read_manifest
from dsla.convert.plan import Plan
from dsla.errors import AdapterError, PlanError
from dsla.storage import write_atomically, write_json


def check_reorder(adapter: Adapter, out: Path) -> None:
    """Checks that an adapter can be written in another order.

    Args:
        adapter: the adapter.
        out: the folder of the one to be written.

    Raises:
        AdapterError: if the adapter's conversion has not finished, or `out` holds an adapter already.
    """
    if adapter.max_level < adapter.plan.teacher.n_layers:
        raise AdapterError(
            f"{adapter.path} holds {adapter.max_level} of {adapter.plan.teacher.n_layers} layers, and only all of them can "
            "be ordered anew: finish its `dsla convert` first"
        )
    if (out / "manifest.json").exists():
        raise AdapterError(f"{out} holds an adapter already: name another folder for the reordered one")


def reorder(adapter: Adapter, plan: Plan, out: Path) -> None:
    """Writes an adapter with the same weights in another order. It is no adapter before the last file is written.

    Args:
        adapter: the adapter as it is; not changed.
        plan: the order that is wanted; its teacher and mixer are the adapter's.
        out: folder of the new adapter; must exist.

    Raises:
        AdapterError: as `check_reorder`, or if it cannot be written.
        PlanError: if the plan is not for this adapter's layers.
    """
    check_reorder(adapter, out)
    if (
        plan.teacher != adapter.plan.teacher
        or plan.mixer != adapter.plan.mixer
        or set(plan.order) != set(adapter.mixers)
    ):
        raise PlanError(f"the plan does not order the layers of {adapter.path}, with its teacher and mixer")
    _copy(adapter, plan, out)


def copy_adapter(adapter: Adapter, out: Path) -> None:
    """Writes an adapter as it is to another folder. It is no adapter before the last file is written.

    Args:
        adapter: the adapter.
        out: folder of the copy; must exist.

    Raises:
        AdapterError: if it cannot be written.
    """
    _copy(adapter, adapter.plan, out)


def _copy(adapter: Adapter, plan: Plan, out: Path) -> None:
    manifest = read_manifest(adapter.path)
    layers = {}
    try:
        for position, layer in enumerate(plan.order[: adapter.max_level]):
            entry = manifest["layers"][str(layer)]
            name = listed_file(str(layer), entry)
            write_atomically(out / name, lambda temporary, name=name: shutil.copyfile(adapter.path / name, temporary))  # type: ignore[misc]
            layers[str(layer)] = {
                **entry,
                "position": position,
                "trained_at": entry.get("trained_at", adapter.plan.order.index(layer)),
            }
        plan.save(out / "plan.json")
        write_json(out / "manifest.json", {**manifest, "layers": layers})
    except OSError as error:
        raise AdapterError(f"cannot write to {out}: {error.strerror or error}") from error
