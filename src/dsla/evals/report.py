"""The report of an evaluation, as data: what is left of the teacher at each level, how sure that is, and what it costs.

`write_report` makes report.json of it, and of that report.md and report.html.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dsla.evals.runner import Setting
from dsla.evals.setting import TEACHER
from dsla.evals.speed import Speeds, request_bytes, speeds_to_json, weight_bytes
from dsla.evals.statistics import Estimate, Pairs, retention
from dsla.evals.store import Store
from dsla.evals.subject import Subject
from dsla.evals.suites import COMMONSENSE
from dsla.evals.task import Item, Task
from dsla.storage import write_atomically, write_json

MEMORY_AT = (1024, 4096, 8192, 32768)
"""Lengths in tokens that memory is told for, as far as the model's context goes."""


def make_report(
    subject: Subject, tasks: Sequence[Task], settings: Sequence[Setting], store: Store, speeds: Speeds,
    about: Mapping[str, Any], left_out: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Everything the report says.

    Args:
        subject: what was evaluated.
        tasks: with what; every item of them is in the store.
        settings: at what, the teacher first.
        store: the items.
        speeds: as measured.
        about: what was evaluated with what.
        left_out: task or file -> why it was left out.

    Returns:
        Plain data; a figure with an interval is `{value, low, high}`, in which what is not defined is None.
    """
    pairs = {task.name: Pairs(task, [store.of(setting.key(task)) for setting in settings]) for task in tasks}
    rows = [_task(task, pairs[task.name], settings, store) for task in tasks]
    report = {
        "format": 1,
        "about": dict(about),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": [{"level": setting.level, "states": setting.states} for setting in settings],
        "commonsense": _commonsense(pairs, settings),
        "tasks": sorted(rows, key=_worst_first),
        "not_judged": {row["name"]: row["not_judged"] for row in rows if row["not_judged"]},
        "left_out": dict(left_out),
        "memory": _memory(subject, settings),
        "speed": speeds_to_json(speeds),
    }
    return json.loads(json.dumps(_plain(report)))  # type: ignore[no-any-return]


def write_report(report: dict[str, Any], store: Store) -> None:
    """Writes report.json, report.md and report.html into the store's folder."""
    from dsla.evals.render import to_html, to_markdown

    write_json(store.folder / "report.json", report)
    markdown, page = to_markdown(report).encode(), to_html(report).encode()
    write_atomically(store.folder / "report.md", lambda path: path.write_bytes(markdown))
    write_atomically(store.folder / "report.html", lambda path: path.write_bytes(page))


def _task(task: Task, pairs: Pairs, settings: Sequence[Setting], store: Store) -> dict[str, Any]:
    on = {setting.level: at for at, setting in enumerate(settings) if setting.states == "on"}
    results = []
    for at, setting in enumerate(settings):
        result: dict[str, Any] = {
            "level": setting.level,
            "states": setting.states,
            "score": pairs.mean(at),
            "difference": pairs.difference(at, 0),
        }
        if task.metric == "nll":
            result["ratio"] = pairs.ratio(at)
        elif task.higher_is_better:
            result["retention"] = pairs.retention(at)
        if setting.states != "on" and setting.level in on:
            # Positive where the states help, whatever the unit's direction.
            gain = pairs.difference(on[setting.level], at)
            result["states_gain"] = gain if task.higher_is_better else Estimate(-gain.value, -gain.high, -gain.low)
        result["parts"] = _parts(task, store.of(setting.key(task)).values())
        results.append(result)
    return {
        "name": task.name,
        "group": task.group,
        "metric": task.metric,
        "chance": task.chance,
        "higher_is_better": task.higher_is_better,
        "items": len(pairs.ids),
        "not_judged": _not_judged(task, pairs),
        "results": results,
    }


def _not_judged(task: Task, pairs: Pairs) -> str:
    """Why a task cannot show what a level loses; empty where it can."""
    if not task.higher_is_better:
        return ""
    teacher = pairs.mean(0).value
    if task.min_teacher and teacher <= task.min_teacher:
        return f"the teacher scores {teacher:.3f}, which is not above {task.min_teacher:g}"
    if pairs.above_chance(0).low <= 0:
        return f"the teacher scores {teacher:.3f}, which cannot be told from chance ({task.chance:g})"
    return ""


def _parts(task: Task, items: Sequence[Item] | Any) -> dict[str, float]:
    """Mean score of every part that items are broken down into; of `nll` the perplexity."""
    sums: dict[str, list[float]] = {}
    for item in items:
        for label, (score, weight) in item.details.get("parts", {}).items():
            total = sums.setdefault(label, [0.0, 0.0])
            total[0] += score * weight
            total[1] += weight
    means = {label: total / weight for label, (total, weight) in sums.items() if weight}
    return {label: math.exp(mean) for label, mean in means.items()} if task.metric == "nll" else means


def _commonsense(pairs: Mapping[str, Pairs], settings: Sequence[Setting]) -> dict[str, Any] | None:
    there = [pairs[name] for name in COMMONSENSE if name in pairs]
    if not there:
        return None
    return {
        "tasks": [one.task.name for one in there],
        "missing": [name for name in COMMONSENSE if name not in pairs],
        "results": [
            {"level": setting.level, "states": setting.states, "retention": retention(there, at)}
            for at, setting in enumerate(settings)
        ],
    }


def _worst_first(row: dict[str, Any]) -> tuple[bool, float, str]:
    """Sorts by what is left at the highest level; what has no such figure or is not judged comes last."""
    with_states = [result for result in row["results"] if result["states"] == "on" and result["level"]]
    left = kept(max(with_states or row["results"], key=lambda result: result["level"]))
    known = left is not None and math.isfinite(left) and not row["not_judged"]
    return not known, left if known and left is not None else 0.0, row["name"]


def kept(result: Mapping[str, Any]) -> float | None:
    """Share of the teacher a result keeps: its retention, of perplexity one over the ratio; None where neither is defined."""
    for key in ("retention", "ratio"):
        if key in result:
            figure = result[key]
            value = figure.value if isinstance(figure, Estimate) else figure["value"]
            return value if key == "retention" or value is None else 1 / value
    return None


def _memory(subject: Subject, settings: Sequence[Setting]) -> dict[str, Any]:
    weights, adapter = weight_bytes(subject)
    lengths = [tokens for tokens in MEMORY_AT if tokens <= subject.context] or [subject.context]
    levels = sorted({setting.level for setting in settings} | {TEACHER.level})
    return {
        "teacher_bytes": weights,
        "adapter_bytes": adapter,
        "request_bytes": {
            str(level): {str(tokens): request_bytes(subject, level, tokens) for tokens in lengths} for level in levels
        },
    }


def _plain(data: Any) -> Any:
    """As JSON has it: estimates as objects, numbers that are not finite as null."""
    if isinstance(data, Estimate):
        return _plain(dataclasses.asdict(data))
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
