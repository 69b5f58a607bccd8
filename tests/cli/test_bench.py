"""The verb `bench`, in this process, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsla.bench import crossover as crossover_module
from dsla.bench import sweep as sweep_module
from dsla.bench.roofline import read_bandwidth
from dsla.cli.app import build
from dsla.errors import ConfigError, DataError, DslaError
from tests.bench.traces import ROWS, write_trace
from tests.server.site import VOCABULARY, Site

pytestmark = pytest.mark.usefixtures("tiny_home")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Site() as site:
        yield site.address


def dsla(*arguments: str) -> Result:
    return CliRunner().invoke(build(["bench"]), ["bench", *arguments], env={"COLUMNS": "200"})


def replayed(address: str, out: Path, *arguments: str) -> Result:
    trace = write_trace(out.parent / "bursts.jsonl")
    options = ("--vocabulary", str(VOCABULARY), "--length-scale", "0.02", "--max-prompt", "100", "--out", str(out))
    return dsla("serve", address, "--trace", str(trace), *options, *arguments)


def test_serve_replays_a_trace_and_writes_it_down(address: str, tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = replayed(address, out, "--rates", "20,10x", "--slo-ttft", "30", "--slo-tpot", "30")
    assert result.exit_code == 0, result.output
    for text in (
        "bursts: 4 requests",
        "lengths times 0.02",
        "1 longer than the limits were dropped",
        "bursts, 1 dropped",
        "100%",
        "0, 0",
    ):
        assert text in result.stdout
    data = json.loads((out / "serve.json").read_text(encoding="utf-8"))
    assert [run["rate"] for run in data["runs"]] == [20.0, 5.0]
    assert [run["dropped"] for run in data["runs"]] == [1, 1]
    assert data["settings"]["length_scale"] == 0.02 and data["settings"]["limits"] == [100, None, 4096]
    assert (out / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_compare_shows_two_records_side_by_side(address: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert replayed(address, tmp_path / name, "--rates", "20").exit_code == 0
    paths = [str(tmp_path / name / "serve.json") for name in ("one", "two")]
    result = dsla("compare", *paths, "--out", str(tmp_path / "both"))
    assert result.exit_code == 0, result.output
    for text in ("A: one, B: two", "bursts", "100%"):
        assert text in result.stdout
    assert (tmp_path / "both" / "compare.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    for path, message in (("other.json", "is no record of"), ("none.json", "cannot read")):
        refused = dsla("compare", paths[0], str(tmp_path / path))
        assert isinstance(refused.exception, DataError) and message in str(refused.exception)


def test_serve_writes_what_there_is_when_it_is_stopped(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep_module.replay

    async def stopped(server: object, requests: object, seed: object, *rest: object) -> None:
        await real(server, requests, seed, *rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "replay", stopped)
    result = replayed(address, tmp_path / "out", "--rates", "20,30")
    assert result.exit_code == 130, result.output
    data = json.loads((tmp_path / "out" / "serve.json").read_text(encoding="utf-8"))
    assert [run["rate"] for run in data["runs"]] == [20.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slo-ttft", "0"), "--slo-ttft: expected a number above 0, found 0.0"),
        (("--slo-tpot", "nan"), "--slo-tpot: expected a number above 0, found nan"),
        (("--length-scale", "-1"), "--length-scale: expected a number above 0"),
        (("--rates", "1,,2"), "--rates: expected requests a second"),
        ((), "no server answers at http://127.0.0.1:9"),
    ],
)
def test_serve_refuses(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = replayed(NOWHERE, tmp_path / "out", *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_serve_finds_a_wrong_trace_before_it_asks_a_server(tmp_path: Path) -> None:
    result = dsla("serve", NOWHERE, "--trace", str(tmp_path / "none.jsonl"), "--out", str(tmp_path))
    assert isinstance(result.exception, DataError) and "no trace at" in str(result.exception)
    wrong = write_trace(tmp_path / "wrong.jsonl", [*ROWS, {"t_s": 20}])
    result = dsla("serve", NOWHERE, "--trace", str(wrong), "--out", str(tmp_path))
    assert isinstance(result.exception, DataError) and "wrong.jsonl, line 6" in str(result.exception)
    (tmp_path / "a").mkdir()
    twice = [str(write_trace(tmp_path / folder / "same.jsonl")) for folder in ("", "a")]
    result = dsla("serve", NOWHERE, "--trace", twice[0], "--trace", twice[1], "--out", str(tmp_path))
    assert isinstance(result.exception, ConfigError) and "same name" in str(result.exception)


def test_serve_names_limits_that_leave_nothing(address: str, tmp_path: Path) -> None:
    result = replayed(address, tmp_path / "out", "--max-output", "1", "--length-scale", "1")
    assert isinstance(result.exception, ConfigError) and "none of the 5 requests fits" in str(result.exception)


def test_serve_says_where_no_objective_is_met(address: str, tmp_path: Path) -> None:
    result = replayed(address, tmp_path / "out", "--rates", "20", "--slo-ttft", "1e-9")
    assert result.exit_code == 0, result.output
    assert "Not one answer counts" in result.stdout


def test_crossover_times_a_model(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover_module, "read_bandwidth", lambda: read_bandwidth(1 << 20))
    options = ("--contexts", "32,64", "--rounds", "1", "--batch", "2", "--threads", "1", "--out", str(tmp_path))
    result = dsla("crossover", folders[0], "--adapter", folders[1], "--levels", "0,3", *options)
    assert result.exit_code == 0, result.output
    for text in ("tiny: decode of 2 at once", "Faster than level 0 from", "crossover.json"):
        assert text in result.stdout
    data = json.loads((tmp_path / "crossover.json").read_text(encoding="utf-8"))
    assert data["settings"]["model"] == "tiny" and data["settings"]["levels"] == [0, 3]
    assert (tmp_path / "crossover.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--levels", "a"), "--levels: expected whole numbers"),
        (("--levels", "0,9"), "level 9 is out of range"),
        (("--contexts", "5000"), "5000 tokens are out of range"),
        (("--contexts", "32", "--weights", "int3"), "weights must be one of"),
    ],
)
def test_crossover_refuses(folders: tuple[str, str], arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    options = ("--adapter", folders[1], "--threads", "1", "--out", str(tmp_path))
    result = dsla("crossover", folders[0], *options, *arguments)
    assert isinstance(result.exception, DslaError)
    assert message in str(result.exception)
