"""The verb `doctor`: its facts are those of the code that acts on them, and its advice follows from them alone."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dsla.cli import advice as advice_module
from dsla.cli.advice import advise
from dsla.cli.app import build
from dsla.cli.diagnosis import Capacity, Facts, Gpus, Kernels, Model, Package, find_kernels, find_packages
from dsla.engine.threads import Bounds, bounds
from dsla.errors import AdapterError, ConfigError, KernelError, ModelError
from dsla.ops import cpu
from dsla.ops.cpu import bindings, kernels
from dsla.ops.cpu.build import Compiler
from dsla.server import build as server_build

# Found before any test has a cache folder of its own, in which they would be compiled anew.
kernels()

GOOD = Facts(
    dsla="0", python="3", system="Linux 6", processor="x",
    kernels=Kernels(True, None, "/bin/g++", ("AVX2", "AMX"), True, None, "AVX512"),
    gpus=Gpus((), None, None), threads=Bounds(8, 4, None, None), free_bytes=1 << 30, keeps_freed_memory=True,
    open_files=65_536,
    packages=(Package("torch", "2.12", ">=2.11", True),),
    model=Model("m", "bfloat16", True, 128, 4, 1 << 29, (Capacity(0, 1, 2),)), missing=None,
)  # fmt: skip


def dsla(*arguments: str) -> Result:
    return CliRunner().invoke(build(["doctor", "fetch"]), ["doctor", *arguments])


def changed(**parts: Any) -> Facts:
    """Good facts with changes; `kernels={...}` changes the kernels' own."""
    nested = {name: replace(getattr(GOOD, name), **part) for name, part in parts.items() if isinstance(part, dict)}
    return replace(GOOD, **parts | nested)


@pytest.fixture
def kernels_anew() -> Iterator[None]:
    """The kernels are looked for again, in the test and after it."""
    kernels.cache_clear()
    yield
    kernels.cache_clear()
    kernels()


def test_where_all_is_well_there_is_no_advice() -> None:
    assert advise(GOOD) == []
    assert advise(changed(threads=Bounds(8, 4, 8, None))) == []
    assert advise(changed(threads=Bounds(8, 4, 2, 2))) == []
    assert advise(changed(keeps_freed_memory=False, system="Darwin 25")) == []


@pytest.mark.parametrize(
    ("parts", "found", "do"),
    [
        ({"kernels": {"setting": "off", "active": False}}, "DSLA_KERNELS=off", "unset DSLA_KERNELS"),
        ({"kernels": {"active": False, "compiler": None}}, "no C++ compiler", "apk add g++"),
        ({"kernels": {"active": False, "reason": "disk full"}}, "cannot be compiled", "/bin/g++ says: disk full"),
        ({"kernels": {"tiles": False}}, "refuses its tile registers", "Linux 5.16"),
        ({"kernels": {"tiles": False, "setting": "vectors"}}, "AMX is not used", "unset DSLA_KERNELS"),
        ({"model": {"native": False, "dtype": "float32"}}, "m is float32", "--weights bf16"),
        ({"threads": Bounds(8, 4, 1, None)}, "OMP_NUM_THREADS is 1, and 8 cores", "unset OMP_NUM_THREADS"),
        ({"threads": Bounds(8, 4, 1, 3)}, "and 3 cores", "unset"),
        ({"keeps_freed_memory": False}, "malloc gives freed memory back", "glibc"),
        ({"open_files": 1024}, "may open 1,024 files, and each connection takes one", "ulimit -Hn"),
        ({"free_bytes": None}, "does not say", "--memory"),
        ({"packages": (Package("torch", "9", "<2", False),)}, "torch 9 is not among", "pip install 'torch<2'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_has_one_advice(parts: dict[str, Any], found: str, do: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice_module.shutil, "which", lambda program: "/sbin/apk" if program == "apk" else None)
    (advice,) = advise(changed(**parts))
    assert found in advice.found and do in advice.do


@pytest.mark.usefixtures("tiny_home")
def test_a_model_is_looked_at_as_it_would_be_served(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    result = dsla(folders[0], "--adapter", folders[1], "--json")
    found = json.loads(result.stdout)
    model = found["model"]
    assert (model["name"], model["dtype"], model["context"], model["native"]) == ("tiny", "float32", 4096, False)
    assert model["threads"] == torch.get_num_threads()
    low, high = model["capacity"]
    assert (low["level"], high["level"]) == (0, 3)
    # 2 KV heads of 6 in float32: pages of 16 tokens, 1,536 bytes each, in 4 layers.
    assert low["request_bytes"] == 4096 // 16 * 1536 * 4
    assert high["request_bytes"] < low["request_bytes"] / 3
    for capacity in (low, high):
        assert capacity["tokens"] == pytest.approx(4096 * model["budget_bytes"] / capacity["request_bytes"], rel=1e-3)
    assert found["threads"]["logical"] == bounds().logical
    assert found["kernels"]["active"] == (kernels() is not None)
    # The tiny model is float32, which the kernels do not compute.
    assert result.exit_code == 1
    assert any("float32" in advice["found"] for advice in found["advice"])


@pytest.mark.usefixtures("tiny_home")
def test_it_is_readable(folders: tuple[str, str]) -> None:
    result = dsla(folders[0], "--adapter", folders[1])
    assert result.exit_code == 1
    for text in ("Would be better:", "tokens at level 3, in requests of 4,096", "-> serve it with --weights bf16"):
        assert text in result.stdout


@pytest.mark.usefixtures("tiny_home")
def test_where_the_system_does_not_say_what_is_free(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> int:
        raise ConfigError("give --memory")

    monkeypatch.setattr(server_build, "free_memory", unknown)
    result = dsla(folders[0])
    assert result.exit_code == 1, result.output
    assert (
        "1024.0 MiB hold 2,796,200 tokens at level 0, in" in result.stdout
        and "give each command --memory" in result.stdout
    )


def test_without_the_default_model_it_fetches_nothing(empty_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice_module, "advise", lambda facts: [])
    result = dsla()
    assert result.exit_code == 0, result.output
    assert "not in the cache yet (checksums.json is missing): `dsla fetch` brings it" in result.stdout
    assert not (empty_cache / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("./nowhere",), ModelError, "there is no model folder"),
        (("{model}", "--adapter", "./nowhere"), AdapterError, "no adapter at"),
    ],
)
@pytest.mark.usefixtures("tiny_home")
def test_it_refuses(folders: tuple[str, str], arguments: tuple[str, ...], error: type[Exception], message: str) -> None:
    result = dsla(*(argument.format(model=folders[0]) for argument in arguments))
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


@pytest.mark.usefixtures("kernels_anew")
def test_kernels_that_are_off_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "find_compiler", lambda: Compiler("/bin/g++", ""))
    monkeypatch.setenv("DSLA_KERNELS", "off")
    found = find_kernels()
    assert (found.active, found.setting, found.reason) == (False, "off", "DSLA_KERNELS=off")
    monkeypatch.delenv("DSLA_KERNELS")

    def fail() -> None:
        raise KernelError("no room")

    kernels.cache_clear()
    monkeypatch.setattr(bindings, "library", fail)
    found = find_kernels()
    assert (found.active, found.compiler, found.reason) == (False, "/bin/g++", "no room")
    monkeypatch.setattr(cpu, "find_compiler", fail)
    found = find_kernels()
    assert (found.active, found.compiler, found.reason) == (False, None, "no room")


def test_kernels_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSLA_KERNELS", raising=False)
    engine, found = kernels(), find_kernels()
    assert found.active == (engine is not None)
    if engine is not None:
        assert found.tiles == engine.tiles
        assert found.tiles <= ("AMX" in found.instructions)


def test_packages_are_held_against_the_declared_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else real(name))
    found = {package.name: package for package in find_packages()}
    assert not found["torch"].within and "<2.14" in found["torch"].tested
    assert found["rich"].within
    assert "dsla" not in found

    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert find_packages() == ()
