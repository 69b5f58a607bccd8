"""A report's data as titled tables of text; how they are drawn is `render`'s business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table with what is to be said of it.

    Attributes:
        title: its heading.
        text: what it shows, a paragraph.
        head: names of the columns.
        rows: cells.
        plot: name of the picture beside it, if one.
    """

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]
    plot: str = ""


def tables(report: Report) -> list[Table]:
    """All tables that have something in them, in reading order."""
    found = [
        _glance(report), _tasks(report), _positions(report), _states(report), _parts(report), _memory(report),
        _speed(report), _named(report, "not_judged", "Left out of the judgement", _NOT_JUDGED),
        _named(report, "left_out", "Left out", "Tasks and files that were not there, or not asked for."),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def name_of(result: dict[str, Any]) -> str:
    """A setting, in short."""
    return f"level {result['level']}" + ("" if result["states"] == "on" else f", {_states_of(result['states'])}")


def sizes(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**20:,.1f} MiB"


_NOT_JUDGED = (
    "What the teacher itself cannot do says nothing of a level. The scores are listed above; they count in no other figure "
    "than the commonsense one."
)


def _states_of(states: str) -> str:
    if states.startswith("no "):
        return f"without state {states[3:]}"
    return {"off": "states off", "floor": "floor"}[states]


def _figure(figure: dict[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    if figure["low"] is None:
        return format(figure["value"], form)
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def _of(row: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    return next(r for r in row["results"] if (r["level"], r["states"]) == (setting["level"], setting["states"]))


def _glance(report: Report) -> Table:
    texts = [row for row in report["tasks"] if row["metric"] == "nll"]
    judged = [row for row in report["tasks"] if not row["not_judged"]]
    length = max(map(int, report["memory"]["request_bytes"]["0"]))
    whole = report["memory"]["request_bytes"]["0"][str(length)]
    head = [
        "", *(f"perplexity ratio, {row['name'].split('/')[-1]}" for row in texts), "commonsense retention", "worst task",
        f"memory of a request of {length:,} tokens",
    ]  # fmt: skip
    rows = []
    for at, setting in enumerate(report["settings"]):
        sense = report["commonsense"]["results"][at]["retention"] if report["commonsense"] else None
        held = report["memory"]["request_bytes"][str(setting["level"])][str(length)]
        rows.append([
            name_of(setting), *(_figure(_of(row, setting)["ratio"]) for row in texts), _figure(sense), _worst(judged, setting),
            f"{sizes(held)} ({held / whole:.0%})",
        ])  # fmt: skip
    text = (
        "What is left of the teacher, level 0. The ratio is the level's perplexity over the teacher's, 1 is the best. "
        "Retention is (score - chance) / (teacher's score - chance); the commonsense figure adds both up over its tasks "
        "first. In brackets: 95% intervals, paired bootstrap over items."
    )
    if report["commonsense"] and report["commonsense"]["missing"]:
        text += f" Not in the commonsense figure: {', '.join(report['commonsense']['missing'])}."
    return Table("Levels at a glance", text, head, rows, "glance")


def _worst(judged: list[dict[str, Any]], setting: dict[str, Any]) -> str:
    left = [
        (result["retention"]["value"], row["name"]) for row in judged if "retention" in (result := _of(row, setting))
    ]
    left = [one for one in left if one[0] is not None]
    return "{1} ({0:.2f})".format(*min(left)) if left and setting["level"] else "-"


def _tasks(report: Report) -> Table:
    # What states are worth has a table of its own; here the columns would be too many.
    shown = [setting for setting in report["settings"] if setting["states"] == "on"]
    shown = shown if len(shown) > 1 else report["settings"]
    rows = []
    for row in report["tasks"]:
        star = " *" if row["not_judged"] else ""
        unit = "perplexity" if row["metric"] == "nll" else row["metric"]
        cells = [f"{row['name']}{star}", unit, str(row["items"])]
        for result in (_of(row, setting) for setting in shown):
            cell = f"{result['score']['value']:.3f}"
            if result["level"]:
                if "ratio" in result:
                    cell += f"; x {_figure(result['ratio'])}"
                elif "retention" in result and not row["not_judged"]:
                    cell += f"; {_figure(result['retention'], 2)}"
                else:
                    cell += f"; {_figure(result['difference'], 3, True)}"
            cells.append(cell)
        rows.append(cells)
    text = (
        "A row a task, the one that keeps least at the highest level first. A cell is the score, then the retention (after "
        "'x': the ratio of perplexities; with a sign: the difference to the teacher, where there is no retention). * = left "
        "out of the judgement, see below."
    )
    return Table("Tasks, worst first", text, ["task", "unit", "items", *map(name_of, shown)], rows, "tasks")


def _positions(report: Report) -> Table:
    rows = []
    for row in report["tasks"]:
        if row["metric"] == "nll":
            teacher = row["results"][0]["parts"]
            for label, value in teacher.items():
                others = [f"{result['parts'][label] / value:.3f}" for result in row["results"][1:]]
                rows.append([row["name"].split("/")[-1], label, f"{value:.2f}", *others])
    head = ["text", "positions", "teacher's perplexity", *map(name_of, report["settings"][1:])]
    return Table(
        "Perplexity by position", "Ratio to the teacher's perplexity, by place of the token in its window: what states lose "
        "shows late.", head, rows, "positions",
    )  # fmt: skip


def _states(report: Report) -> Table:
    settings = [setting for setting in report["settings"] if setting["states"] != "on"]
    rows = []
    for row in report["tasks"]:
        gains = [_of(row, setting).get("states_gain") for setting in settings]
        if any(gains):
            rows.append([row["name"], row["metric"], *(_gain(gain) for gain in gains)])
    text = (
        "Score with all states less the score without, in the task's unit (nats a token for perplexity), positive where the "
        "states help. Bold: the interval does not hold 0. 'floor': window and sinks of the teacher's own attention, no adapter."
    )
    return Table("What the states give", text, ["task", "unit", *map(name_of, settings)], rows)


def _gain(gain: dict[str, Any] | None) -> str:
    text = _figure(gain, 3, True)
    sure = gain is not None and gain["low"] is not None and (gain["low"] > 0 or gain["high"] < 0)
    return f"**{text}**" if sure else text


def _parts(report: Report) -> Table:
    rows = [
        [row["name"], label, *(f"{result['parts'].get(label, float('nan')):.2f}" for result in row["results"])]
        for row in report["tasks"]
        if row["metric"] != "nll"
        for label in row["results"][0]["parts"]
    ]
    head = ["task", "part", *map(name_of, report["settings"])]
    return Table("Tasks by part", "Mean score of the items of each part.", head, rows, "depths")


def _memory(report: Report) -> Table:
    memory = report["memory"]
    head = ["", *(f"{int(tokens):,} tokens" for tokens in memory["request_bytes"]["0"])]
    rows = [
        [
            f"level {level}",
            *(f"{sizes(held)} ({held / memory['request_bytes']['0'][tokens]:.0%})" for tokens, held in row.items()),
        ]
        for level, row in memory["request_bytes"].items()
    ]
    teacher, adapter = memory["teacher_bytes"], memory["adapter_bytes"]
    text = (
        f"Of one request, beside the weights: {sizes(teacher)} of the teacher and {sizes(adapter)} of the adapter, which all "
        f"levels share ({(teacher + adapter) / teacher:.3f} of the teacher's)."
    )
    return Table("Memory", text, head, rows)


def _speed(report: Report) -> Table:
    rows = [
        [f"level {level}", f"{speed['read']:,}", _rate(speed["prefill"]), _rate(speed["decode"])]
        for level, speed in report["speed"].items()
    ]
    text = (
        "Tokens a second of one request, median of the rounds and their range, levels timed in turn. Measured on the Hugging "
        "Face model that evaluation runs on, which is not the engine that serves."
    )
    return Table("Speed", text, ["", "context", "reading", "writing"], rows)


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['value']:,.1f} ({rate['low']:,.1f} to {rate['high']:,.1f})"


def _named(report: Report, key: str, title: str, text: str) -> Table:
    return Table(title, text, ["", "why"], [[name, why] for name, why in report[key].items()])
