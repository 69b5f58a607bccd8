"""The command line's frame: verbs, help, versions, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsla
from dsla.cli import app
from dsla.errors import ModelError


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsla.cli.app", *arguments],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "COLUMNS": "200", **environment},
    )  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsla", *arguments])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from dsla.cli import app; app.build()\n"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
    result = run("--help")
    assert result.returncode == 0
    assert [verb for verb in app.VERBS if verb not in result.stdout] == []


@pytest.mark.parametrize("verb", app.VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(app.build(), [verb, "--help"])
    assert result.exit_code == 0, result.output


def test_every_verb_file_is_in_the_table() -> None:
    files = {path.stem for path in Path(app.__file__).parent.glob("*.py")}
    assert set(app.VERBS) <= files


def test_version() -> None:
    result = CliRunner().invoke(app.build(), ["--version"])
    assert (result.exit_code, result.output) == (0, f"dsla {dsla.__version__}\n")


def test_error_is_one_line_and_status_2() -> None:
    result = run("fetch", "./nowhere")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: there is no model folder 'nowhere'; give an existing folder or a hub name (owner/model)\n"
    )


def test_error_message_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(verbs: object) -> None:
        raise ModelError("first\n  second")

    monkeypatch.delenv("DSLA_DEBUG", raising=False)
    monkeypatch.setattr(app, "build", fail)
    assert call(monkeypatch, "fetch") == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_debug_shows_the_traceback() -> None:
    result = run("fetch", "./nowhere", DSLA_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ModelError" in result.stderr


def test_unknown_verb_and_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "fetsch") == 2
    assert "No such command 'fetsch'" in capsys.readouterr().err
    assert call(monkeypatch, "fetch", "--frm") == 2
    assert "No such option" in capsys.readouterr().err


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delenv("DSLA_DEBUG", raising=False)
    assert call(monkeypatch, "fetch") == 2
    assert "pip install 'dsla[cli]'" in capsys.readouterr().err


def test_fetch_prints_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dsla import hub

    monkeypatch.setattr(hub, "resolve_model", lambda name: tmp_path / (name or "default"))
    for arguments, expected in ((["fetch"], "default"), (["fetch", "owner/m"], "owner/m")):
        result = CliRunner().invoke(app.build(), arguments)
        assert (result.exit_code, result.output) == (0, f"{tmp_path / expected}\n")
