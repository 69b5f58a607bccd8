"""Tasks over long texts: questions, summaries, labels after many examples, things to find again, the next line of code."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsla.errors import DataError
from dsla.evals import text_metrics as metrics
from dsla.evals.records import read_records, shuffled, wrong_text
from dsla.evals.subject import Subject
from dsla.evals.task import Item, Task

_SCHEMA = {"id": str, "context": str, "question": str, "answers": list, "metric": str}
_RECALL_NEEDS = 0.3
_FEWEST = 20

_QUESTION = "\n\nAnswer the question with a few words from the text above.\n\nQuestion: {}\nAnswer:"
_SUMMARY = "\n\nAnswer in full sentences, from the text above.\n\nQuestion: {}\nAnswer:"
_FIND = "\n\n{}\nAnswer:"


@dataclass(frozen=True)
class Kind:
    """How a task is asked and scored.

    Attributes:
        metric: as the records name it.
        prompt: what follows the context, the question in it.
        tokens: an answer has at most.
        stop: what ends an answer.
        recall: whether it asks for what was there word for word: it tells something only where the teacher can do it.
        labels: file of the labels there are.
    """

    metric: str
    prompt: str
    tokens: int
    stop: tuple[str, ...] = ("\n",)
    recall: bool = False
    labels: str | None = None


KINDS = {
    "hotpotqa": Kind("qa_f1", _QUESTION, 32),
    "hotpotqa_8k": Kind("qa_f1", _QUESTION, 32),
    "multihop_small": Kind("qa_f1", _QUESTION, 32),
    "duorc": Kind("qa_f1", _QUESTION, 32),
    "quoref": Kind("qa_f1", _QUESTION, 32),
    "nq_multidoc20": Kind("substring", _QUESTION, 32, recall=True),
    "nq_multidoc80": Kind("substring", _QUESTION, 32, recall=True),
    "wikihop": Kind("exact_match", "\n\n{}\nAnswer:", 16),
    "babi": Kind("exact_match", "\nQuestion: {}\nAnswer with one word:", 8, recall=True),
    "qmsum": Kind("rouge_l", _SUMMARY, 128, ("\n\n",)),
    "squality_dev": Kind("rouge_l", _SUMMARY, 256, ("\n\n",)),
    "scitldr": Kind("rouge_l", "\n\n{}\nSummary:", 64),
    "trec_100shot": Kind("classification", "\n{}", 16, labels="labels_trec.json.gz"),
    "trec_400shot": Kind("classification", "\n{}", 16, labels="labels_trec.json.gz"),
    "banking77_2shot": Kind("classification", "\n{}", 24, labels="labels_banking77.json.gz"),
    "banking77_5shot": Kind("classification", "\n{}", 24, labels="labels_banking77.json.gz"),
    "longeval_topics": Kind("substring", _FIND, 32, recall=True),
    "longeval_lines": Kind("substring", _FIND, 16, recall=True),
    "kv_retrieval": Kind("substring", "\n\n{}", 48, recall=True),
    "lcc_python": Kind("edit_sim", "{}", 64),
}
"""Task -> how it is asked; its file is `long/NAME.jsonl.zst`."""

_UNITS = {
    "qa_f1": "f1",
    "exact_match": "exact match",
    "substring": "accuracy",
    "rouge_l": "rougeL",
    "classification": "accuracy",
    "edit_sim": "edit similarity",
}


@dataclass(frozen=True)
class Question:
    """A record as the model reads it: tokens of its context, those of what is asked, and the record itself."""

    context: list[int]
    asked: list[int]
    record: dict[str, Any]


def long_tasks(data: Path, tokenizer: Any, context: int, limit: int | None = None) -> tuple[list[Task], dict[str, str]]:
    """The tasks whose files are there. Prompts are plain text, without a chat template; answers are written greedily.

    A record whose prompt and answer do not fit the model's context is left out, never cut.

    Args:
        data: folder with `long/`.
        tokenizer: the model's.
        context: of the model, in tokens.
        limit: items of each task, at most; the same ones every time, of those that fit.

    Returns:
        The tasks, and what was left out: a task's name -> why.

    Raises:
        DataError: a file is damaged or does not fit its schema, naming file, line and key.
    """
    tasks, left_out = list[Task](), dict[str, str]()
    for name, kind in KINDS.items():
        path = data / "long" / f"{name}.jsonl.zst"
        if not path.is_file():
            left_out[name] = "its file is not in long/"
            continue
        records = read_records(path, _SCHEMA, check=lambda record, kind=kind: _wrong(record, kind))  # type: ignore[misc]
        labels = _labels(path.parent / kind.labels) if kind.labels else []
        questions, looked_at = _fitting(
            records, kind, tokenizer, context - kind.tokens, shuffled(len(records), name), limit
        )
        if (longer := looked_at - len(questions)) > 0:
            left_out[f"{name}, {longer} of {looked_at} records"] = (
                f"they and an answer need more than {context:,} tokens"
            )
        if len(questions) >= min(_FEWEST, limit or _FEWEST, len(records)):
            tasks.append(_task(name, kind, questions, labels))
        elif questions:
            left_out[name] = f"the {len(questions)} records that fit are too few to tell anything"
    return tasks, left_out


def _task(name: str, kind: Kind, questions: list[Question], labels: list[str]) -> Task:
    score = _scorer(kind.metric, labels)

    def run(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        open_questions = (question for question in questions if question.record["id"] not in done)
        for context, group in itertools.groupby(open_questions, key=lambda question: question.context):
            # Several questions ask about one text: it is read once.
            read = subject.read(context)
            for question in group:
                prefix = subject.read(question.asked, read) if question.asked else read
                written = subject.generate_text(prefix, kind.tokens, kind.stop)
                yield _item(question.record, score(written, question.record["answers"]), written)

    choices = [1 / len(question.record["choices"]) for question in questions if "choices" in question.record]
    chance = sum(choices) / len(choices) if choices else 1 / len(labels) if labels else 0.0
    contexts = [list(group)[0] for _, group in itertools.groupby(questions, key=lambda question: question.context)]
    return Task(
        name=name,
        group="long",
        metric=_UNITS[kind.metric],
        run=run,
        items=len(questions),
        chance=chance,
        min_teacher=_RECALL_NEEDS if kind.recall else 0.0,
        tokens=max(len(question.context) + len(question.asked) for question in questions) + kind.tokens,
        reads=sum(len(question.context) for question in contexts) + sum(len(question.asked) for question in questions),
        writes=len(questions) * kind.tokens,
    )


def _item(record: dict[str, Any], score: float, written: str) -> Item:
    parts = {"parts": {record["subtask"]: [score, 1.0]}} if "subtask" in record else {}
    return Item(record["id"], score, details={"written": written, **parts})


def _scorer(metric: str, labels: list[str]) -> Callable[[str, list[str]], float]:
    """(what was written, accepted answers) -> score from 0 to 1."""
    if metric == "classification":
        return lambda written, answers: float(metrics.first_label(written, labels) in answers)
    one: Callable[[str, str], float] = getattr(metrics, metric)
    return lambda written, answers: max(one(written, answer) for answer in answers)


def _fitting(
    records: list[dict[str, Any]], kind: Kind, tokenizer: Any, room: int, order: list[int], limit: int | None
) -> tuple[list[Question], int]:
    """The first records in `order` that fit, those of one context together, and how many were looked at for them."""
    found, looked_at = dict[int, Question](), 0
    for at in order:
        if len(found) == limit:
            break
        looked_at += 1
        record = records[at]
        texts = [record["context"], kind.prompt.format(record["question"])]
        context, asked = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if len(context) + len(asked) <= room:
            found[at] = Question(context, asked, record)
    first: dict[str, int] = {}
    for at in sorted(found):
        first.setdefault(found[at].record["context"], at)
    places = sorted(found, key=lambda at: (first[found[at].record["context"]], at))
    return [found[at] for at in places], looked_at


def _wrong(record: dict[str, Any], kind: Kind) -> str | None:
    if record["metric"] != kind.metric:
        return f"'metric' must be {kind.metric!r}, found {record['metric']!r}"
    if not record["context"].strip():
        return "'context' is empty"
    if not isinstance(record.get("subtask", ""), str):
        return f"'subtask' must be str, found {type(record['subtask']).__name__}"
    if "choices" in record and (not isinstance(record["choices"], list) or not record["choices"]):
        return "'choices' must be a list that is not empty"
    return wrong_text(record, "answers")


def _labels(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            labels = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label for label in labels):
        raise DataError(f"{path}: expected a list of labels, texts that are not empty")
    return labels
