"""A headless Chromium, and servers to point it at."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dsla.engine import Engine
from tests.server.conftest import MODEL
from tests.server.site import Site
from tests.server.tiny import tiny_engine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

STEP_SECONDS = 0.02


def slow_engine() -> Engine:
    """An engine that takes its time, so that there is something to watch."""
    engine = tiny_engine()
    step = engine.step

    def slow() -> Any:
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    return engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A server without keys, with something to watch."""
    with Site(MODEL, slow_engine) as running:
        yield running
