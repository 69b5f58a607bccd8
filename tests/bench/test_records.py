"""Where a record says it comes from."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from dsla.bench.records import _commit, origin, write_record


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with a package in it that is committed."""

    def git(*arguments: str) -> None:
        name = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path


def test_commit_of_a_package_in_a_checkout(checkout: Path) -> None:
    package = checkout / "package"
    clean = _commit(package)
    assert clean is not None and re.fullmatch(r"[0-9a-f]{40}", clean)
    (checkout / "elsewhere").write_text("x")
    assert _commit(package) == clean
    (package / "__init__.py").write_text("changed = 1")
    assert _commit(package) == f"{clean}-dirty"


def test_a_package_that_is_only_installed_has_no_commit(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    installed = checkout / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert _commit(installed) is None
    assert _commit(tmp_path_factory.mktemp("no-repository")) is None


def test_command_shows_urls_and_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "/home/me/bin/dsla",
        "bench",
        "serve",
        "http://host:1/v1",
        "--trace",
        "/home/me/t.jsonl",
        "--out=/home/me/o",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert origin()["command"] == "dsla bench serve http://host:1/v1 --trace t.jsonl --out=o"


@pytest.mark.parametrize("given", [["--api-key", "secret"], ["--api-key=secret"]])
def test_command_shows_no_keys(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dsla", "bench", "serve", "u", *given, "--seed", "1"])
    command = origin()["command"]
    assert command.startswith("dsla bench serve u --api-key") and command.endswith("... --seed 1")
    assert "secret" not in command


def test_records_are_json_with_a_line_a_member(tmp_path: Path) -> None:
    data = {"name": "é", "rows": [{"a": 1 / 3, "b": [2 / 3, 7]}, {"c": None}], "none": []}
    write_record(data, tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "é", "rows": [{"a": 0.333333, "b": [0.666667, 7]}, {"c": None}], "none": []}
    assert '    {"c": null}\n' in text
