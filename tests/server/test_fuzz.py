"""Requests made from the server's own OpenAPI schema, valid ones and broken ones: what comes back is as the schema says."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.reports import report
from tests.server.site import Site

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
FORESEEN = {"timeout", "draining"}
"""Codes of 5xx that this server's settings, or requests to it, lead to."""


def strategy(operation: Any) -> st.SearchStrategy[Any]:
    """Valid and, where an operation takes anything, broken requests."""
    takes = [*operation.body, *operation.path_parameters, *operation.query]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if takes else [GenerationMode.POSITIVE]
    return st.one_of([operation.as_strategy(mode) for mode in modes])


@pytest.mark.parametrize(
    ("most", "least"), [(22, 200), pytest.param(700, 5000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_answers_are_as_the_schema_says(most: int, least: int, caplog: pytest.LogCaptureFixture) -> None:
    counts: Counter[int] = Counter()
    with Site(request_seconds=0.2) as site, httpx.Client(base_url=site.address, timeout=30) as http:
        schema = schemathesis.openapi.from_url(f"{site.address}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=most,
                deadline=None,
                database=None,
                derandomize=most < 100,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy(operation))
            def ask(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = site.model
                response = case.call(timeout=30)
                case.validate_response(response, checks=CHECKS)
                assert response.status_code < 500 or response.json()["error"]["code"] in FORESEEN, response.text
                counts[response.status_code] += 1
                if case.path == "/admin/drain":
                    http.post("/admin/drain", json={"draining": False}).raise_for_status()

            ask()
        assert http.get("/ready").status_code == 200
    assert counts.total() >= least, counts
    assert {200, 400, 404} <= set(counts)
    if least >= 5000:
        report("fuzz", {"requests": counts.total()} | {f"answers {status}": n for status, n in sorted(counts.items())})
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
