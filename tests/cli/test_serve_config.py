"""Settings of `dsla serve`: flags over environment over file over defaults, shown with their origin, keys hidden."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from dsla.cli.app import build
from dsla.errors import ConfigError
from dsla.server.run import DRAIN_SECONDS

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(build(["serve"]), ["serve", *map(str, arguments)])


def shown(*arguments: object) -> dict[str, tuple[Any, str]]:
    """Value and origin of each setting that `--print-config` shows; None = not set."""
    result = serve(*arguments, "--print-config")
    assert result.exit_code == 0, (result.output, result.exception)
    found = {}
    for line in result.stdout.splitlines():
        text, origin = line.rsplit("# ", 1)
        key, _, value = text.removeprefix("# ").partition(":")
        found[key.strip()] = (json.loads(value) if value.strip() else None, origin)
    return found


def refused(*arguments: object) -> str:
    """What `dsla serve` says where it does not start."""
    result = serve(*arguments)
    assert isinstance(result.exception, ConfigError), (result.output, result.exception)
    assert result.stdout == "", "nothing was loaded"
    return str(result.exception)


def test_flags_win_over_environment_over_file_over_defaults(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown()["port"] == (8000, "default")
    config.write_text("port: 1\nmax-waiting: 2\nmemory: 1GiB\nadaptive: on\nmodel: from/file\nno-auth: yes\n")
    found = shown("--config", config)
    assert found["port"] == (1, f"file {config}")
    assert found["adaptive"] == ("on", f"file {config}")
    assert found["model"] == ("from/file", f"file {config}")
    assert found["no-auth"] == (True, f"file {config}")
    assert found["host"] == ("127.0.0.1", "default")
    assert found["level"] == (None, "default")
    monkeypatch.setenv("DSLA_PORT", "3")
    monkeypatch.setenv("DSLA_MODEL", "from/environment")
    monkeypatch.setenv("DSLA_MAX_WAITING", "5")
    found = shown("--config", config, "--port", 4)
    assert found["port"] == (4, "flag")
    assert found["max-waiting"] == (5, "environment, DSLA_MAX_WAITING")
    assert found["model"] == ("from/environment", "environment, DSLA_MODEL")
    assert found["memory"] == ("1GiB", f"file {config}")
    assert shown("--config", config, "from/flag")["model"] == ("from/flag", "flag")


def test_the_time_to_end_answers_is_a_setting_as_all_others(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown()["drain-seconds"] == (DRAIN_SECONDS, "default")
    config.write_text("drain-seconds: 0\n")
    assert shown("--config", config)["drain-seconds"] == (0.0, f"file {config}")
    monkeypatch.setenv("DSLA_DRAIN_SECONDS", "2.5")
    assert shown("--config", config)["drain-seconds"] == (2.5, "environment, DSLA_DRAIN_SECONDS")
    assert shown("--drain-seconds", 3)["drain-seconds"] == (3.0, "flag")


def test_the_file_may_be_named_in_the_environment(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("port: 1\n")
    monkeypatch.setenv("DSLA_CONFIG", str(config))
    assert shown()["port"] == (1, f"file {config}")


def test_keys_are_hidden_and_counted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(f"api-key: [{KEY}, {OTHER}]\nadmin-key: {KEY}x\ncors-origin: https://example.org\n")
    result = serve("--config", config, "--print-config")
    assert "sk-" not in result.stdout
    found = shown("--config", config)
    assert found["api-key"][0] == ["hidden", "hidden"]
    assert found["admin-key"][0] == "hidden"
    assert found["cors-origin"][0] == ["https://example.org"]
    monkeypatch.setenv("DSLA_API_KEYS", f"{KEY}  {KEY}2 {KEY}3")
    assert shown("--config", config)["api-key"] == (["hidden"] * 3, "environment, DSLA_API_KEYS")


def test_the_key_of_a_client_is_not_one_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLA_API_KEY", KEY)
    assert shown()["api-key"] == (None, "default")


def test_what_is_shown_is_a_file_that_gives_the_same(config: Path) -> None:
    first = serve("--port", 1, "--memory", "1GiB", "--cors-origin", "*", "--print-config").stdout
    config.write_text(first)
    assert yaml.safe_load(first)["memory"] == "1GiB"
    before, after = shown("--port", 1, "--memory", "1GiB", "--cors-origin", "*"), shown("--config", config)
    assert {key: value for key, (value, _) in before.items()} == {key: value for key, (value, _) in after.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key 'prot': the nearest one is 'port'"),
        ("max_waiting: 1", "unknown key 'max_waiting': the nearest one is 'max-waiting'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("xyzzy: 1", "unknown key 'xyzzy': the nearest one is"),
        ("port: many", "port: .*integer.*, found 'many'"),
        ("port: 70000", "port: .*65535.*, found '70000'"),
        ("drain-seconds: -1", "drain-seconds: .*, found '-1'"),
        ("drain-seconds: inf", "drain-seconds: .*86400.*, found 'inf'"),
        ("port: [1, 2]", "port: expected one value, found a list"),
        ("port: {a: 1}", "port: expected one value, found keys and values"),
        ("api-key: {a: 1}", "api-key: expected values, found keys and values"),
        ("no-auth: maybe", "no-auth: .*, found 'maybe'"),
        ("level:", "level has no value: leave the key out"),
        ("level: null", "level has no value: leave the key out"),
        ("- port", "expected keys and values, as 'port: 8000', found a list"),
        ("port: [", "is not valid YAML"),
    ],
)
def test_files_that_are_refused(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    found = refused("--config", config)

    assert re.search(message, found, re.DOTALL), found
    assert str(config) in found


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused("--config", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_is_one(config: Path, text: str) -> None:
    config.write_text(text)
    assert shown("--config", config)["port"] == (8000, "default")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DSLA_PROT", "1", "unknown name DSLA_PROT: the nearest one is DSLA_PORT"),
        ("DSLA_API_KEYES", KEY, "unknown name DSLA_API_KEYES: the nearest one is DSLA_API_KEYS"),
        ("DSLA_PORT", "many", "environment: DSLA_PORT: "),
        ("DSLA_PORT", "tcp://10.0.0.1:80", "enableServiceLinks"),
        ("DSLA_NO_AUTH", "maybe", "environment: DSLA_NO_AUTH: "),
    ],
)
def test_environments_that_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    found = refused()
    assert message in found
    assert KEY not in found


def test_names_of_others_in_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSLA_SERVICE_HOST", "DSLA_PORT_8000_TCP_ADDR", "DSLA_DEBUG", "DSLA_KERNELS"):
        monkeypatch.setenv(name, "x")
    assert shown()["port"] == (8000, "default")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "other machines can reach 0.0.0.0, and there is no API key.*--no-auth"),
        (("--host", "0.0.0.0", "--admin-key", KEY), "there is no API key"),
        (("--no-auth", "--api-key", KEY), "--no-auth and API keys exclude each other"),
        (("--api-key", "two words"), "API key 1 must be printable ASCII"),
        (("--api-key", "a,b"), "API key 1 must be printable ASCII"),
        (("--api-key", KEY, "--admin-key", KEY), "the admin key is an API key too"),
        (("--api-key-file", "/no/such/file"), "key file /no/such/file cannot be read"),
        (("--cors-origin", "example.org"), "an origin is written as https://example.org"),
        (("--max-body", "lots"), "--max-body: expected a size"),
        (("--cors-origin", "https://example.org/"), "found 'https://example.org/': give 'https://example.org'"),
        (("--log-format", "xml"), "--log-format must be one of text, json, found 'xml'"),
        (("--log-level", "loud"), "--log-level must be one of debug, info, warning, error, found 'loud'"),
    ],
    ids=str,
)
def test_it_does_not_start(arguments: tuple[str, ...], message: str) -> None:

    found = refused("/no/such/model", "--port", 0, *arguments)
    assert re.search(message, found), found
    assert KEY not in found


@pytest.mark.parametrize("arguments", [("--no-auth",), ("--api-key", KEY)], ids=lambda names: names[0])
def test_other_machines_are_served_with_keys_or_by_name(arguments: tuple[str, ...]) -> None:
    result = serve("/no/such/model", "--host", "0.0.0.0", "--port", 0, *arguments)
    assert "loading /no/such/model" in result.stdout
    assert "/no/such/model" in str(result.exception) and not isinstance(result.exception, ConfigError)
