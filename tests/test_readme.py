"""The README: its examples work as printed, and its figures are those of the result files."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 120
SERVING = re.compile(r"Serving .* on (http://[^/\s]+)/v1\b")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A `dsla serve` of the default model on a free port; its address."""
    command = [sys.executable, "-m", "dsla.cli.app", "serve", "--port", "0", "--memory", "256MiB", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        deadline = threading.Timer(SECONDS, process.kill)
        deadline.start()
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if found := SERVING.search(line):
                    deadline.cancel()
                    yield found.group(1)
                    break
            else:
                raise AssertionError(f"the server did not start; it printed {''.join(printed)!r}")
        finally:
            deadline.cancel()
            process.kill()


@pytest.mark.model
def test_curl_example_works_as_printed(server: str, default_model: Path) -> None:
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    answer = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8000", server)],
        capture_output=True, text=True, check=True, timeout=SECONDS,
    ).stdout  # fmt: skip
    assert '"chat.completion"' in answer and '"levels"' in answer, answer


@pytest.mark.model
def test_openai_example_works_as_printed(server: str, default_model: Path) -> None:
    (code,) = [block for block in blocks("python") if "openai" in block]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", server)], capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'levels': [[0, " in done.stdout


@pytest.mark.model
def test_python_example_works_as_printed(default_model: Path) -> None:
    (code,) = [block for block in blocks("python") if "dsla.load" in block]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "The river rises in" in done.stdout


def test_commands_exist() -> None:
    from dsla.cli.app import VERBS

    used = set(re.findall(r"dsla (\w+)", " ".join(blocks("sh"))))
    assert {"demo", "order", "convert", "verify", "serve"} <= used & set(VERBS)


def test_figures_are_those_of_the_result_files() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.readme(README) == README, "run `python benchmarks/tables.py`"


def test_files_it_names_exist() -> None:
    for path in re.findall(r"(?:docs|recipes|benchmarks)/[\w./-]+", README):
        assert (ROOT / path.rstrip(".")).exists(), path
