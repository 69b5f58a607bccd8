"""`dsla eval` on a tiny model, end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsla.cli.app import build
from dsla.errors import AdapterError, ConfigError, DslaError

SMALL = ("--levels", "0,3", "--tasks", "copy/*,generation/agreement", "--limit", "2")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build(["eval", "verify"]), ["eval", *map(str, arguments)])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def fail(error: type[DslaError], message: str, *arguments: object) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, error), f"{result.output}\n{result.exception!r}"
    assert message in str(result.exception)


@pytest.mark.usefixtures("tiny_home")
def test_report_of_a_tiny_model(folders: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [folders[0], "--adapter", folders[1], *SMALL, "--states", "on,off,floor,each", "--out", out]
    printed = succeed(*arguments)
    assert "2 tasks, 4 items, at 6 settings: about 0:" in printed and "report.html" in printed
    report = json.loads((out / "report.json").read_text())
    assert [(s["level"], s["states"]) for s in report["settings"]] == [
        (0, "on"), (3, "on"), (3, "off"), (3, "floor"), (3, "no 0"), (3, "no 1"),
    ]  # fmt: skip
    assert {"ppl/wikitext2_valid.txt.gz", "mc"} <= set(report["left_out"])
    assert "Levels at a glance" in (out / "report.html").read_text()

    items = (out / "items.jsonl").read_bytes()
    succeed(*arguments)
    assert (out / "items.jsonl").read_bytes() == items, "nothing is scored twice"
    (out / "items.jsonl").write_bytes(items[: len(items) // 2])
    succeed(*arguments)
    assert (out / "items.jsonl").read_bytes() == items, "an interrupted run goes on"

    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (["--limit", "3"], ["--suite", "full"], ["--dtype", "float64"]):
        fail(ConfigError, "holds another evaluation", *arguments, *other)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


@pytest.mark.usefixtures("tiny_home")
def test_levels_are_quarters_where_none_are_named(folders: tuple[str, str], tmp_path: Path) -> None:
    succeed(folders[0], "--adapter", folders[1], "--tasks", "copy/*", "--limit", "1", "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [s["level"] for s in report["settings"]] == [0, 1, 2, 3]


@pytest.mark.usefixtures("tiny_home")
def test_a_model_without_an_adapter(folders: tuple[str, str], tmp_path: Path) -> None:
    succeed(folders[0], "--tasks", "copy/*", "--limit", "1", "--out", tmp_path / "out")
    assert "no adapter" in (tmp_path / "out" / "report.md").read_text()
    fail(ConfigError, "without an adapter there is level 0 alone", folders[0], "--levels", "2", "--out", tmp_path / "b")


@pytest.mark.usefixtures("tiny_home")
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ConfigError, "no level 4: its adapter has levels 0 to 3", ["--levels", "0,4"]),
        (ConfigError, "--levels: expected numbers as 0,8,15, found '0;3'", ["--levels", "0;3"]),
        (ConfigError, "expected on, off, floor or each, found 'none'", ["--states", "none"]),
        (ConfigError, "no suite 'slow'", ["--suite", "slow"]),
        (ConfigError, "no task 'hellaswg'", ["--tasks", "hellaswg"]),
        (ConfigError, "holds none of the folders", ["--data", "EMPTY"]),
        (ConfigError, "--dtype: expected bfloat16", ["--dtype", "int8"]),
        (ConfigError, "device 'banana' cannot be used", ["--device", "banana"]),
        (ConfigError, "is not empty and holds no evaluation", ["--out", "FULL"]),
        (ConfigError, "cannot be written to", ["--out", "FULL/file/out"]),
        (AdapterError, "no adapter at", ["--adapter", "nowhere"]),
    ],
)
def test_everything_given_is_checked_before_the_model_is_loaded(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: type[DslaError], message: str, options: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.modules["dsla.convert.load"], "load_model", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").write_text("")
    fail(error, message, folders[0], "--adapter", folders[1], "--out", tmp_path / "out", *options)
