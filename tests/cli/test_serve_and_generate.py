"""The verbs `serve` and `generate`, in this process, on a tiny model."""

from __future__ import annotations

import re
import threading
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from dsla.cli.app import build
from dsla.errors import ConfigError, DslaError
from dsla.server import run as run_module
from tests.test_readme import SERVING

pytestmark = pytest.mark.usefixtures("tiny_home")


def dsla(*arguments: str) -> Result:
    return CliRunner().invoke(build(["serve", "generate"]), arguments)


def generated(folders: tuple[str, str], *arguments: str) -> str:
    model, adapter = folders
    result = dsla("generate", "the quick 🦆", "--model", model, "--adapter", adapter, "--max-tokens", "30", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate_writes_text_that_depends_on_level_and_seed(folders: tuple[str, str]) -> None:
    greedy = generated(folders)
    assert greedy == generated(folders)
    assert greedy != generated(folders, "--level", "3")
    assert greedy != generated(folders, "--raw")
    sampled = generated(folders, "--temperature", "2", "--seed", "1")
    assert sampled == generated(folders, "--temperature", "2", "--seed", "1")
    assert sampled != generated(folders, "--temperature", "2", "--seed", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--level", "4"), "level 4 is out of range"), (("--adapter", "nowhere"), "no adapter at nowhere")],
)
def test_generate_refuses(folders: tuple[str, str], arguments: tuple[str, ...], message: str) -> None:
    result = dsla("generate", "x", "--model", folders[0], *arguments)
    assert isinstance(result.exception, DslaError)
    assert message in str(result.exception)


class Visit:
    """Stands in for the wait for Ctrl-C: runs the real server, asks it something, and stops it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[Any] = []
        real = run_module.server

        def server(app: Any, *rest: Any) -> Any:
            self._server = real(app, *rest)
            return self

        monkeypatch.setattr(run_module, "server", server)

    def run(self, sockets: list[Any]) -> None:
        thread = threading.Thread(target=self._server.run, kwargs={"sockets": sockets})
        thread.start()
        address = run_module.url(sockets[0])
        body = {"model": "tiny", "prompt": "fox", "max_tokens": 3}
        self.answers = [
            httpx.get(f"{address}/v1/models").json(),
            httpx.post(f"{address}/v1/completions", json=body).json(),
            httpx.get(f"{address}/admin/state").json(),
            httpx.get(f"{address}/admin/plan").json(),
        ]
        self._server.should_exit = True
        thread.join()


def test_serve_prints_what_is_active_and_serves(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit(monkeypatch)
    result = dsla("serve", folders[0], "--adapter", folders[1], "--port", "0", "--memory", "8MiB", "--page-tokens", "8")
    assert result.exit_code == 0, result.output
    models, answer, state, plan = visit.answers
    assert models["data"][0]["id"] == "tiny"
    assert answer["dsla"]["levels"] == [[0, 0]]
    assert state["stats"]["max_level"] == 3
    assert plan["adapter"]["name"] == "adapter" and re.fullmatch("[0-9a-f]{64}", plan["adapter"]["sha256"])
    for text in (
        "tiny, 4 layers, float32",
        "adapter, 3 of 4 layers",
        "0 ... 3, adaptive",
        "8.0 MiB",
        "http://127.0.0.1:",
    ):
        assert text in result.stdout
    assert result.stdout.rstrip().endswith("Stopped")
    assert SERVING.search(result.stdout), "the README's tests find the server by this line"


def test_serve_at_a_fixed_level_without_adapter(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit(monkeypatch)
    result = dsla("serve", folders[0], "--adapter", folders[1], "--port", "0", "--memory", "8MiB", "--level", "2")
    assert "fixed at 2 of 0 ... 3" in result.stdout
    assert visit.answers[1]["dsla"]["levels"] == [[0, 2]]
    result = dsla("serve", folders[0], "--port", "0", "--memory", "8MiB")
    assert "none ships with this model" in result.stdout
    assert visit.answers[3]["adapter"] is None


def test_serve_finds_a_port_in_use_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    with run_module.bind("127.0.0.1", 0) as held:
        port = str(held.getsockname()[1])
        result = dsla("serve", "/no/such/model", "--port", port)
    assert isinstance(result.exception, ConfigError)
    assert f"port {port} on 127.0.0.1 is in use" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "lots"), "--memory: expected a size"),
        (("--level", "1", "--adaptive", "on"), "exclude each other"),
        (("--adaptive", "on"), "need an adapter"),
        (("--adaptive", "maybe"), "--adaptive must be on or off, found 'maybe'"),
    ],
)
def test_serve_refuses(folders: tuple[str, str], arguments: tuple[str, ...], message: str) -> None:
    result = dsla("serve", folders[0], "--port", "0", *arguments)
    assert isinstance(result.exception, DslaError)
    assert message in str(result.exception)


def test_serve_names_the_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "dsla.server.run")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = dsla("serve", "--port", "0")
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'dsla[serve]'" in str(result.exception)
