"""The report says what the items say: figures, order, what was left out, and nothing from outside the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsla.evals.report import make_report, write_report
from dsla.evals.runner import evaluate
from dsla.evals.setting import TEACHER, Setting
from dsla.evals.speed import Rate, Speed, request_bytes
from dsla.evals.store import Store
from dsla.evals.subject import Subject
from dsla.evals.task import Item, Task
from tests.evals.tiny import subject

SETTINGS = [TEACHER, Setting(2), Setting(2, "off"), Setting(4), Setting(4, "off")]
SPEEDS = {level: Speed(64, Rate(100.0 + level, 90, 110), Rate(10.0 + level, 9, 11)) for level in (0, 2, 4)}
ABOUT = {
    "model": "tiny<&", "model_sha256": "a" * 64, "adapter": "b" * 64, "suite": "quick", "dtype": "float64", "device": "cpu",
    "dsla": "1", "torch": "2",
}  # fmt: skip
N = 40
RIGHT = {  # of N items, at each of the settings
    "hellaswag": (30, 25, 20, 20, 15),
    "piqa": (36, 34, 30, 29, 25),
    "passkey/512": (40, 38, 8, 30, 4),
    "passkey/1024": (10, 6, 6, 2, 2),
    "coin": (21, 19, 20, 22, 20),
}
CHANCE = {"hellaswag": 0.25, "piqa": 0.5, "coin": 0.5}
LOSSES = (2.0, 2.1, 2.3, 2.2, 2.6)


def at(model: Subject) -> int:
    """Place of the setting a model is at."""
    return next(
        i for i, s in enumerate(SETTINGS) if (s.level, s.states == "off") == (model.level, bool(model.states_off))
    )


def accuracy(name: str) -> Task:
    def run(model: Subject, done: frozenset[str]) -> Iterator[Item]:
        for i in range(N):
            score = float(i < RIGHT[name][at(model)])
            parts = {f"depth {50 * (i % 2)}%": [score, 1]} if name.startswith("passkey") else {}
            yield Item(str(i), score, details={"parts": parts} if parts else {})

    return Task(
        name=name, group="commonsense", metric="accuracy", run=run, items=N, chance=CHANCE.get(name, 0.0),
        min_teacher=0.3 if name.startswith("passkey") else 0.0,
    )  # fmt: skip


def losses(model: Subject, done: frozenset[str]) -> Iterator[Item]:
    for i in range(4):
        loss = LOSSES[at(model)] + 0.1 * i
        yield Item(str(i), loss, 100, {"parts": {"0-256": [loss - 0.1, 50], "256-1k": [loss + 0.1, 50]}})


def divergence(model: Subject, done: frozenset[str]) -> Iterator[Item]:
    yield from (Item(str(i), 0.1 * at(model)) for i in range(4))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder, model = tmp_path_factory.mktemp("report"), subject()
    tasks = [
        *map(accuracy, RIGHT),
        Task(name="perplexity/books", group="perplexity", metric="nll", run=losses, items=4, higher_is_better=False),
        Task(name="generation/kl", group="generation", metric="kl", run=divergence, items=4, higher_is_better=False),
    ]
    store = Store(folder, {})
    evaluate(model, tasks, SETTINGS, store, SPEEDS)
    report = make_report(model, tasks, SETTINGS, store, SPEEDS, ABOUT, {"gen/gsm8k": "it is not there"})
    write_report(report, store)
    return report, folder


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in report["tasks"] if row["name"] == name)


def test_figures(made: tuple[dict[str, Any], Path]) -> None:
    report = made[0]
    hellaswag = row(report, "hellaswag")["results"]
    assert [r["score"]["value"] for r in hellaswag] == [n / N for n in RIGHT["hellaswag"]]
    assert hellaswag[3]["retention"]["value"] == pytest.approx((20 / 40 - 0.25) / (30 / 40 - 0.25))
    assert hellaswag[3]["retention"]["low"] < hellaswag[3]["retention"]["value"] < hellaswag[3]["retention"]["high"]
    books = row(report, "perplexity/books")["results"]
    assert books[0]["score"]["value"] == pytest.approx(math.exp(2.15))
    assert books[3]["ratio"] == {key: pytest.approx(math.exp(0.2)) for key in ("value", "low", "high")}
    assert books[3]["parts"]["256-1k"] == pytest.approx(math.exp(2.45))
    assert row(report, "generation/kl")["results"][4]["difference"]["value"] == pytest.approx(0.4)
    assert "retention" not in row(report, "generation/kl")["results"][4]
    both = report["commonsense"]["results"][3]["retention"]["value"]
    assert both == pytest.approx((20 / 40 - 0.25 + 29 / 40 - 0.5) / (30 / 40 - 0.25 + 36 / 40 - 0.5))
    assert report["commonsense"]["missing"] == ["arc_easy", "arc_challenge", "winogrande", "openbookqa"]


def test_what_states_give(made: tuple[dict[str, Any], Path]) -> None:
    passkey, books = row(made[0], "passkey/512")["results"], row(made[0], "perplexity/books")["results"]
    assert passkey[2]["states_gain"]["value"] == pytest.approx(30 / 40) and passkey[2]["states_gain"]["low"] > 0.5
    assert books[4]["states_gain"]["value"] == pytest.approx(0.4)
    assert "states_gain" not in passkey[3]
    assert passkey[0]["parts"] == {"depth 0%": 1.0, "depth 50%": 1.0}


def test_what_the_teacher_cannot_do_is_not_judged(made: tuple[dict[str, Any], Path]) -> None:
    assert made[0]["not_judged"] == {
        "passkey/1024": "the teacher scores 0.250, which is not above 0.3",
        "coin": "the teacher scores 0.525, which cannot be told from chance (0.5)",
    }


def test_worst_first(made: tuple[dict[str, Any], Path]) -> None:
    names = [row["name"] for row in made[0]["tasks"]]
    assert names == [
        "hellaswag", "piqa", "passkey/512", "perplexity/books", "coin", "generation/kl", "passkey/1024",
    ]  # fmt: skip


def test_memory_and_speed(made: tuple[dict[str, Any], Path]) -> None:
    memory, model = made[0]["memory"], subject()
    assert memory["request_bytes"]["4"] == {str(n): request_bytes(model, 4, n) for n in (1024, 4096)}
    assert memory["teacher_bytes"] == sum(p.numel() for p in model.model.parameters()) * 8
    assert memory["adapter_bytes"] == sum(p.numel() for m in model.levels.mixers.values() for p in m.parameters()) * 8
    assert made[0]["speed"]["2"]["decode"]["value"] == 12.0


def test_files(made: tuple[dict[str, Any], Path]) -> None:
    report, folder = made
    assert json.loads((folder / "report.json").read_text()) == report
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for text in (markdown, page):
        for part in (
            "Levels at a glance",
            "Tasks, worst first",
            "What the states give",
            "Left out of the judgement",
            "Memory",
        ):
            assert part in text
        assert "gen/gsm8k" in text and "it is not there" in text
        assert "1.221" in text, "the ratio of perplexities at level 4"
    lines = [line for line in markdown.splitlines() if line.startswith("| hellaswag |")]
    assert lines[0].startswith("| hellaswag | accuracy | 40 | 0.750 | 0.625; 0.75 [")
    for table in markdown.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    assert page.count("<svg") == 4 and "<b>+0.750" in page
    assert "tiny&lt;&amp;" in page and "tiny<&" not in page
    assert not re.search(r"<script|<link|src=|url\(h|<!DOCTYPE svg|<\?xml", page)


def test_a_report_of_the_teacher_alone(tmp_path: Path) -> None:
    model, task, store = subject(), accuracy("coin"), Store(tmp_path, {})
    evaluate(model, [task], [TEACHER], store, SPEEDS)
    report = make_report(model, [task], [TEACHER], store, {0: SPEEDS[0]}, ABOUT | {"adapter": ""}, {})
    write_report(report, store)
    assert report["commonsense"] is None and report["memory"]["request_bytes"].keys() == {"0"}
    assert "no adapter" in (tmp_path / "report.md").read_text()
