"""What can be converted, in which order, and what a layer of a request takes before and after; it never changes."""

from __future__ import annotations

from dsla.convert.adapter import Adapter
from dsla.engine import PackedDecoder
from dsla.mixers import StateSpec
from dsla.server.responses import AdapterCard, AdminPlan, LayerBytes


def plan_of(decoder: PackedDecoder, model_name: str, adapter: Adapter | None) -> AdminPlan:
    """The answer of `GET /admin/plan`.

    Args:
        decoder: the model with its mixers.
        model_name: its name.
        adapter: where the mixers come from; None = there are none, or nobody knows.
    """
    order, slot = decoder.order, decoder.slot_spec
    return AdminPlan(
        model=model_name,
        layers=decoder.n_layers,
        order=list(order),
        max_level=len(order),
        foldable=bool(order) and decoder.foldable,
        mixer=decoder.mixers[order[0]].config if order else None,
        adapter=AdapterCard(name=adapter.path.resolve().name, sha256=adapter.sha256) if adapter else None,
        kept_bytes=_bytes(decoder.kv_spec),
        converted_bytes=_bytes(slot) if slot else None,
    )


def _bytes(spec: StateSpec) -> LayerBytes:
    return LayerBytes(per_token=spec.bytes_per_token, fixed=spec.fixed_bytes)
