"""Fixtures for every test: the default model, and a cache folder that is not the user's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsla.hub import resolve_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Folder of the default model; mark tests that use it with `model`."""
    return resolve_model()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DSLA_HOME", str(folder))
    return folder


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of `benchmarks/`, and what it imports from there, for one test."""
    folder = Path(__file__).parents[1] / "benchmarks"
    names = {path.stem for path in folder.glob("*.py")} - set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a tiny model and of its adapter, made anew for each test file."""
    from tests.server.tiny import save_adapter, save_model

    base = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSLA_HOME", str(base / "home"))
        model = save_model(base / "tiny")
        return str(model), str(save_adapter(base / "adapter", model))


@pytest.fixture
def tiny_home(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder that `folders` were made with."""
    monkeypatch.setenv("DSLA_HOME", str(Path(folders[0]).parent / "home"))
