"""Tasks over long texts, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsla.errors import DataError
from dsla.evals import text_metrics
from dsla.evals.long import KINDS, long_tasks
from dsla.evals.subject import Subject
from dsla.evals.task import Task
from tests.evals.files import NOUNS, write
from tests.evals.tiny import subject

CONTEXT = 600
COUNT = 24


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject()


def record(name: str, i: int, words: int = 20) -> dict[str, Any]:
    """A record; two and two share a context, but not side by side."""
    text = i % (COUNT // 2)
    context = f"Text {text}: " + " ".join(NOUNS[(text + j) % len(NOUNS)] for j in range(words))
    label = {"trec": "City", "bank": "card_arrival"}.get(name[:4], NOUNS[i % len(NOUNS)])
    question = "" if name == "lcc_python" else f"what is {i} {{again}}?"
    extra: dict[str, Any] = {"choices": ["fox", "dog"]} if name == "wikihop" else {}
    extra |= {"subtask": f"part {i % 2}"} if name == "babi" else {}
    return {
        "id": f"{name}-{i}", "context": context, "question": question, "answers": [label, "other"],
        "metric": KINDS[name].metric, "n_tokens": words, **extra,
    }  # fmt: skip


def write_labels(data: Path) -> None:
    for name, labels in (("trec", ["City", "Color"]), ("banking77", ["card_arrival", "card", "a", "b"])):
        (data / "long").mkdir(exist_ok=True, parents=True)
        write(data / f"long/labels_{name}.json.gz", [labels])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    write_labels(data)
    for name in KINDS:
        write(data / f"long/{name}.jsonl.zst", (record(name, i) for i in range(COUNT)))
    return data


def tasks_of(data: Path, model: Subject, limit: int | None = None, context: int = CONTEXT) -> dict[str, Task]:
    return {task.name: task for task in long_tasks(data, model.tokenizer, context, limit)[0]}


def test_every_task_says_what_it_is(data: Path, model: Subject) -> None:
    tasks = tasks_of(data, model)
    assert list(tasks) == list(KINDS)
    assert {task.items for task in tasks.values()} == {COUNT} and {task.group for task in tasks.values()} == {"long"}
    recall = {"nq_multidoc20", "nq_multidoc80", "babi", "longeval_topics", "longeval_lines", "kv_retrieval"}
    assert {name for name, task in tasks.items() if task.min_teacher == 0.3} == recall
    assert tasks["trec_100shot"].chance == tasks["wikihop"].chance == 0.5
    assert tasks["banking77_2shot"].chance == 0.25 and tasks["quoref"].chance == 0
    for name, task in tasks.items():
        assert task.writes == COUNT * KINDS[name].tokens and KINDS[name].tokens < task.tokens <= CONTEXT


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("name", ["quoref", "lcc_python", "babi", "kv_retrieval"])
def test_scores_are_those_of_what_is_written(
    data: Path, model: Subject, monkeypatch: pytest.MonkeyPatch, name: str, level: int
) -> None:
    model.set(level)
    kind, task = KINDS[name], tasks_of(data, model, 8)[name]
    reads, read = [], model.read
    monkeypatch.setattr(model, "read", lambda ids, after=None: reads.append((len(ids), after)) or read(ids, after))
    items = list(task.run(model, frozenset()))
    monkeypatch.undo()
    whole = [size for size, after in reads if after is None]
    assert sum(size for size, _ in reads) == task.reads
    assert len(items) == 8 and len(whole) < 8
    for item in items:
        one = record(name, int(item.id.split("-")[1]))
        ids = [*model.encode(one["context"]), *model.encode(kind.prompt.format(one["question"]))]
        assert len(ids) + kind.tokens <= task.tokens
        written = model.generate_text(ids, kind.tokens, kind.stop)
        assert item.details["written"] == written
        metric = getattr(text_metrics, kind.metric)
        assert item.score == max(metric(written, "other"), metric(written, one["answers"][0]))
        assert item.details.get("parts") == ({one["subtask"]: [item.score, 1.0]} if name == "babi" else None)


def test_best_answer_counts_and_labels_are_read(data: Path, model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set(0)
    tasks = tasks_of(data, model, 4)
    written = {"trec_100shot": " city of ducks", "banking77_2shot": "Card_Arrival", "hotpotqa": " other words"}
    for name, text in written.items():
        monkeypatch.setattr(model, "generate_text", lambda *_, text=text: text)
        scores = [item.score for item in tasks[name].run(model, frozenset())]
        assert scores == [pytest.approx(2 / 3 if name == "hotpotqa" else 1.0)] * 4
        monkeypatch.setattr(model, "generate_text", lambda *_: " colour")
        assert [item.score for item in tasks[name].run(model, frozenset())] == [0.0] * 4


def test_resumed_items_are_the_same(data: Path, model: Subject) -> None:
    model.set(2)
    task = tasks_of(data, model, 10)["kv_retrieval"]
    items = list(task.run(model, frozenset()))
    done = frozenset(item.id for item in items[:3]) | {items[6].id}
    assert list(task.run(model, done)) == [item for item in items if item.id not in done]


def test_a_limit_takes_a_fixed_sample(data: Path, model: Subject) -> None:
    model.set(0)
    ids = {n: {item.id for item in tasks_of(data, model, n)["trec_100shot"].run(model, frozenset())} for n in (4, 9)}
    assert len(ids[4]) == 4 and ids[4] < ids[9] and len(ids[9]) == 9


def test_what_does_not_fit_is_left_out_and_counted(tmp_path: Path, model: Subject) -> None:
    lengths = {"quoref": [20] * 22 + [4000] * 3, "duorc": [20] * 3 + [4000] * 22, "qmsum": [4000] * 25}
    for name, words in lengths.items():
        write(tmp_path / f"long/{name}.jsonl.zst", (record(name, i, count) for i, count in enumerate(words)))
    tasks, left_out = long_tasks(tmp_path, model.tokenizer, CONTEXT)
    assert [(task.name, task.items) for task in tasks] == [("quoref", 22)]
    assert left_out.pop("quoref, 3 of 25 records") == "they and an answer need more than 600 tokens"
    assert left_out.pop("duorc") == "the 3 records that fit are too few to tell anything"
    assert "duorc, 22 of 25 records" in left_out and "qmsum, 25 of 25 records" in left_out
    assert left_out["scitldr"] == "its file is not in long/"
    assert [task.items for task in long_tasks(tmp_path, model.tokenizer, CONTEXT, 2)[0]] == [2, 2]


def test_a_prompt_that_just_fits(tmp_path: Path, model: Subject) -> None:
    write(tmp_path / "long/quoref.jsonl.zst", [record("quoref", 0)])
    need = tasks_of(tmp_path, model)["quoref"].tokens
    assert list(tasks_of(tmp_path, model, context=need)) == ["quoref"]
    assert tasks_of(tmp_path, model, context=need - 1) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "rouge_l"}, "'metric' must be 'qa_f1', found 'rouge_l'"),
        ({"answers": []}, "'answers' is empty"),
        ({"answers": ["a", 1]}, r"'answers'\[1\] must be a text that is not empty, found 1"),
        ({"context": ""}, "'context' is empty"),
        ({"question": None}, "'question' must be str, found NoneType"),
        ({"subtask": 1}, "'subtask' must be str, found int"),
        ({"choices": []}, "'choices' must be a list that is not empty"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, model: Subject, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "long/quoref.jsonl.zst", [record("quoref", 0), {**record("quoref", 1), **change}])
    with pytest.raises(DataError, match=rf"quoref\.jsonl\.zst, line 2: {message}"):
        long_tasks(tmp_path, model.tokenizer, CONTEXT)


@pytest.mark.parametrize(("labels", "message"), [([["a", ""]], "a list of labels"), (["x"], "a list of labels")])
def test_wrong_labels_are_refused(tmp_path: Path, model: Subject, labels: list[Any], message: str) -> None:
    write(tmp_path / "long/trec_100shot.jsonl.zst", [record("trec_100shot", 0)])
    with pytest.raises(DataError, match=r"cannot read .*labels_trec\.json\.gz"):
        long_tasks(tmp_path, model.tokenizer, CONTEXT)
    write(tmp_path / "long/labels_trec.json.gz", labels)
    with pytest.raises(DataError, match=message):
        long_tasks(tmp_path, model.tokenizer, CONTEXT)
