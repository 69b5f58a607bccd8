"""`/ready` and `/metrics`: they tell of what the engine really does."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsla import __version__
from tests.server.asgi import BODY, ENDLESS, app_of, error, until
from tests.server.conftest import MODEL
from tests.server.tiny import tiny_engine

pytestmark = pytest.mark.anyio
Samples = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def samples(http: httpx.AsyncClient) -> Samples:
    """Value of every sample, by its name and the values of its labels but for the model's."""
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(value for name, value in sample.labels.items() if name != "model_name")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.labels.get("model_name", MODEL) == MODEL
    }


async def test_ready_only_while_requests_are_taken() -> None:
    engine, gate = tiny_engine(), threading.Event()
    engine.warm_up = gate.wait  # type: ignore[method-assign, assignment]
    async with app_of(engine) as (running, http):
        assert error(await http.get("/ready")) == (503, "warming_up")
        assert (await http.get("/health")).status_code == 200
        gate.set()
        await until(lambda: running.state == "ready")
        assert (await http.get("/ready")).json() == {"status": "ok"}
        running.drain()
        response = await http.get("/ready")
        assert error(response) == (503, "draining")
        assert int(response.headers["retry-after"]) > 0
        assert (await http.get("/health")).status_code == 200
        running.drain(False)
        assert (await http.get("/ready")).status_code == 200
        await anyio.to_thread.run_sync(running.close)
        assert error(await http.get("/ready")) == (503, "stopped")
        assert error(await http.get("/health")) == (503, "engine_stopped")


async def test_metrics_count_requests_and_tokens() -> None:
    async with app_of() as (_, http):
        before = await samples(http)
        assert before["vllm:prompt_tokens_total", ()] == 0
        body = BODY | {
            "prompt": "the quick brown fox jumps over the lazy dog " * 4,
            "max_tokens": 5,
            "ignore_eos": True,
        }
        answers = [(await http.post("/v1/completions", json=body)).json() for _ in range(2)]
        await http.post("/v1/completions", json=body | {"prompt": ""})
        found = await samples(http)
    prompt = answers[0]["usage"]["prompt_tokens"]
    cached = answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert found["vllm:prompt_tokens_total", ()] == 2 * prompt
    assert found["vllm:prefix_cache_queries_total", ()] == 2 * prompt
    assert found["vllm:prefix_cache_hits_total", ()] == cached
    assert found["dsla_computed_prompt_tokens_total", ()] == 2 * prompt - cached
    assert found["vllm:generation_tokens_total", ()] == 10
    assert found["vllm:request_success_total", ("length",)] == 2
    assert found["vllm:request_success_total", ("stop",)] == 0
    for name, count in {
        "time_to_first_token": 2,
        "inter_token_latency": 8,
        "e2e_request_latency": 2,
        "request_queue_time": 2,
        "request_time_per_output_token": 2,
    }.items():
        assert found[f"vllm:{name}_seconds_count", ()] == count
        assert found[f"vllm:{name}_seconds_bucket", ("+Inf",)] == count
        assert found[f"vllm:{name}_seconds_sum", ()] > 0
    assert found["vllm:e2e_request_latency_seconds_sum", ()] > found["vllm:time_to_first_token_seconds_sum", ()]
    assert found["dsla_http_answers_total", ("/v1/completions", "200")] == 2
    assert found["dsla_http_answers_total", ("/v1/completions", "400")] == 1
    assert found["dsla_http_seconds_total", ("/v1/completions",)] > 0
    assert found["dsla_info", (__version__,)] == 1
    assert found["process_resident_memory_bytes", ()] > 0


async def test_metrics_tell_of_what_runs_now_and_of_conversions() -> None:
    async with app_of() as (engine, http), anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(lambda: http.post("/v1/completions", json=ENDLESS))
        await until(lambda: engine.stats()["generated_tokens"] > 10)
        found = await samples(http)
        assert found["vllm:num_requests_running", ()] == 2
        assert found["dsla_requests_running_by_level", ("0",)] == 2
        assert 0 < found["vllm:kv_cache_usage_perc", ()] < 1
        assert found["dsla_memory_bytes", ("kv",)] > 0 == found["dsla_memory_bytes", ("states",)]
        await anyio.to_thread.run_sync(engine.set_level, 2)
        await until(lambda: engine.stats()["conversions"].get("by hand") == 4)
        found = await samples(http)
        assert found["dsla_requests_running_by_level", ("2",)] == 2
        assert found["dsla_conversions_total", ("by hand",)] == 4
        assert found["dsla_fold_seconds_count", ()] == 4
        assert found["dsla_fold_seconds_sum", ()] > 0
        assert found["dsla_memory_bytes", ("states",)] > 0
        uses = [found["dsla_memory_bytes", (use,)] for use in ("kv", "states", "snapshots", "unused")]
        assert sum(uses) == pytest.approx(found["dsla_memory_budget_bytes", ()], rel=0.05)
        group.cancel_scope.cancel()


async def test_metrics_as_openmetrics() -> None:
    async with app_of() as (_, http):
        response = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_each_application_has_metrics_of_its_own() -> None:
    async with app_of() as (_, first), app_of() as (_, second):
        await first.post("/v1/completions", json=BODY)
        counts: list[Any] = [(await samples(http))["vllm:prompt_tokens_total", ()] for http in (first, second)]
    assert counts[0] > 0 == counts[1]


async def test_unknown_urls_are_one_route_in_the_metrics() -> None:
    async with app_of() as (_, http):
        for name in ("/a", "/b"):
            assert error(await http.get(name)) == (404, "unknown_url")
        assert (await samples(http))["dsla_http_answers_total", ("other", "404")] == 2
