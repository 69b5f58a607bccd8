"""`GET /admin/plan`: what can be converted, and what it does to a request's memory."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from dsla.engine import Engine, EngineConfig, PackedDecoder
from dsla.families import family_of
from tests.server.asgi import app_of, error
from tests.server.conftest import MODEL
from tests.server.tiny import tiny_decoder, tiny_mixers, tiny_model

pytestmark = pytest.mark.anyio

FLOAT32, GROUPS, DIM = 4, 2, 6
STATES, WIDTH, WINDOW, SINKS = 2, 12, 4, 2


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_plan_tells_order_mixer_and_bytes() -> None:
    async with app_of() as (engine, http):
        found = (await http.get("/admin/plan")).json()
        stats = engine.stats()
    rows = 2 * GROUPS * DIM * FLOAT32  # keys and values of a token
    states = STATES * GROUPS * WIDTH * (DIM + 1) * FLOAT32
    assert found == {
        "model": MODEL,
        "layers": 4,
        "order": [2, 0, 3],
        "max_level": 3,
        "foldable": True,
        "mixer": asdict(tiny_mixers()[2].config),
        "adapter": None,
        "kept_bytes": {"per_token": rows, "fixed": 0},
        "converted_bytes": {"per_token": 0, "fixed": states + (WINDOW + SINKS) * rows},
    }
    assert (found["order"], found["max_level"]) == (stats["order"], stats["max_level"])


async def test_without_an_adapter_there_is_nothing_to_convert() -> None:
    model = tiny_model()
    decoder = PackedDecoder(tiny_decoder().weights, model.config, family_of(model.config))
    async with app_of(Engine(decoder, decoder.arena(1 << 20), EngineConfig())) as (_, http):
        found = (await http.get("/admin/plan")).json()
    assert (found["order"], found["max_level"], found["foldable"]) == ([], 0, False)
    assert found["mixer"] is found["adapter"] is found["converted_bytes"] is None
    assert found["kept_bytes"]["per_token"] > 0


async def test_the_schema_names_what_is_answered() -> None:
    async with app_of() as (_, http):
        schema = (await http.get("/openapi.json")).json()
        answer = (await http.get("/admin/plan")).json()
        assert error(await http.post("/admin/plan")) == (405, "method_not_allowed")
    content = schema["paths"]["/admin/plan"]["get"]["responses"]["200"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/AdminPlan"}
    schemas = schema["components"]["schemas"]
    assert set(schemas["AdminPlan"]["properties"]) == set(answer)
    assert set(schemas["DslaConfig"]["properties"]) == set(answer["mixer"])
