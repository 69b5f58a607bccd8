"""Tasks that lm-evaluation-harness scores, over local files. The model it asks is in `harness_model`.

`python -m dsla.evals.harness` is the harness's own command line, with the model `dsla`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsla.errors import ConfigError, DataError, DslaError
from dsla.evals.records import read_records, shuffled, wrong_text
from dsla.evals.subject import Subject
from dsla.evals.task import Item, Task

TASKS = Path(__file__).parent / "tasks"
"""Folder of the harness's task files, for its `--include_path`."""

_CHOICES: dict[str, type] = {"id": str, "context": str, "choices": list, "answer_index": int}
_MOST_CHOICES = 10
_CHARS_PER_TOKEN = 4
_WRITTEN = 256


@dataclass(frozen=True)
class Source:
    """Where a task's questions are, and which of the harness's figures is its score.

    Attributes:
        group: of the task.
        metric: of the harness.
        file: in the folder of evaluation data.
        schema: key -> type in every record.
        filter: of the harness, where a task names one.
    """

    group: str
    metric: str
    file: str
    schema: dict[str, type]
    filter: str = "none"


SOURCES = {
    **{
        name: Source("commonsense", metric, f"mc/{name}.jsonl.gz", _CHOICES)
        for name, metric in (
            ("hellaswag", "acc_norm"),
            ("piqa", "acc_norm"),
            ("arc_easy", "acc_norm"),
            ("arc_challenge", "acc_norm"),
            ("winogrande", "acc"),
            ("openbookqa", "acc_norm"),
        )
    },
    **{
        name: Source("knowledge", "acc", f"mc/{name}.jsonl.gz", _CHOICES)
        for name in ("boolq_closed", "social_iqa", "lsat_lr", "aqua_rat")
    },
    "mmlu": Source("knowledge", "acc", "mc/mmlu.jsonl.gz", {**_CHOICES, "subject": str}),
    "gsm8k": Source(
        "generation",
        "exact_match",
        "gen/gsm8k_test.jsonl.gz",
        {"id": str, "question": str, "answers": list},
        "flexible-extract",
    ),
}
"""Task -> where it comes from."""


def commonsense_tasks(data: Path, limit: int | None = None) -> list[Task]:
    """The multiple-choice tasks whose files are there, of the groups `commonsense` and `knowledge`.

    Prompts and scores are the harness's: an item's score is what its task object makes of the log-likelihoods.

    Args:
        data: folder with `mc/`.
        limit: items of each task, at most; the same ones every time, those of a lower limit among those of a higher one.

    Raises:
        ConfigError: `lm-eval` is not installed.
        DataError: a file is damaged or does not fit its schema, naming file, line and key.
    """
    _check_installed()
    return [
        _task(name, data, limit)
        for name, source in SOURCES.items()
        if source.group != "generation" and (data / source.file).is_file()
    ]


def gsm8k_task(data: Path, limit: int | None = None) -> Task:
    """Grade-school sums without examples: whether the last number written is the answer.

    Args:
        data: folder with `gen/`.
        limit: as for `commonsense_tasks`.

    Raises:
        ConfigError: `lm-eval` is not installed.
        DataError: the file is missing, damaged or does not fit its schema.
    """
    _check_installed()
    return _task("gsm8k", data, limit)


def dataset(*, name: str, data: str | Path | None = None, limit: int | None = None, **_: object) -> dict[str, Any]:
    """Questions as the harness takes them; the task files name this function.

    Args:
        name: of the task.
        data: folder of the evaluation data.
        limit: items, at most.

    Returns:
        The split `test`.

    Raises:
        DataError: no folder is named, or the file does not fit.
    """
    from datasets import Dataset

    if data is None:
        raise DataError(f'task {name} reads local files: name their folder, --metadata \'{{"data": "FOLDER"}}\'')
    return {"test": Dataset.from_list(_questions(name, Path(data), limit))}


def main() -> None:
    """The harness's command line."""
    _check_installed()
    import lm_eval.__main__

    import dsla.evals.harness_model  # noqa: F401  (registers the model)

    lm_eval.__main__.cli_evaluate()


def _task(name: str, data: Path, limit: int | None) -> Task:
    source, questions = SOURCES[name], _questions(name, data, limit)
    choices = [len(question["choices"]) for question in questions if "choices" in question]
    return Task(
        name=name,
        group=source.group,
        metric=source.metric,
        run=_run(name, data, limit),
        items=len(questions),
        chance=sum(1 / count for count in choices) / len(choices) if choices else 0.0,
        reads=sum(map(_chars, questions)) // _CHARS_PER_TOKEN,
        writes=0 if choices else len(questions) * _WRITTEN,
    )


def _run(name: str, data: Path, limit: int | None) -> Callable[[Subject, frozenset[str]], Iterator[Item]]:
    def run(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        from lm_eval.tasks import TaskManager

        from dsla.evals.harness_model import SubjectLM

        settings: Any = {"data": str(data), "limit": limit}
        with _quiet():
            manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=settings)
            task: Any = manager.load([f"dsla_{name}"])["tasks"][f"dsla_{name}"]
        model = SubjectLM(subject)
        for question in task.eval_docs:
            if question["id"] not in done:
                yield _item(task, model, question, SOURCES[name])

    return run


def _item(task: Any, model: Any, question: dict[str, Any], source: Source) -> Item:
    prompt = task.fewshot_context(question, num_fewshot=0)
    requests = task.construct_requests(question, prompt, metadata=(task.task_name, 0, 1))
    requests = requests if isinstance(requests, list) else [requests]
    answers = getattr(model, requests[0].request_type)(requests, disable_tqdm=True)
    for request, answer in zip(requests, answers, strict=True):
        request.resps.append(answer)
    # The harness filters and scores what a task holds.
    task._instances = requests
    task.apply_filters()
    scores = task.process_results(question, [request.filtered_resps[source.filter] for request in requests])
    return Item(
        question["id"],
        float(scores[source.metric]),
        details={**{name: float(score) for name, score in scores.items()}, "answers": [_plain(x) for x in answers]},
    )


def _plain(answer: tuple[float, bool] | str) -> float | str:
    return answer if isinstance(answer, str) else float(answer[0])


def _questions(name: str, data: Path, limit: int | None) -> list[dict[str, Any]]:
    source = SOURCES[name]
    records = read_records(data / source.file, source.schema, check=lambda record: _wrong(record, name))
    chosen = sorted(shuffled(len(records), name)[:limit])
    return [{key: records[at][key] for key in source.schema} for at in chosen]


def _wrong(record: dict[str, Any], name: str) -> str | None:
    if "choices" not in record:
        return wrong_text(record, "answers")
    choices, answer = record["choices"], record["answer_index"]
    if not 2 <= len(choices) <= _MOST_CHOICES:
        return f"'choices' must hold 2 to {_MOST_CHOICES} texts, found {len(choices)}"
    if not 0 <= answer < len(choices):
        return f"'answer_index' must be from 0 to {len(choices) - 1}, found {answer}"
    if not record["context"].strip():
        return "'context' is empty"
    if name == "winogrande" and (len(choices) != 2 or "_" not in record["context"]):
        return "expected two 'choices' and a blank '_' in 'context'"
    return wrong_text(record, "choices")


def _chars(question: dict[str, Any]) -> int:
    if "choices" not in question:
        return len(question["question"])
    return len(question["context"]) + sum(map(len, question["choices"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's advice on its own command line off the screen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "multiple choice is scored by lm-evaluation-harness: install it with `pip install 'dsla[eval]'`"
        )


if __name__ == "__main__":
    try:
        main()
    except DslaError as error:
        sys.exit(f"error: {error}")
