"""Made-up tests of memory: what they ask for is in the context, where it should be, and nothing else changes."""

from __future__ import annotations

import random
import re

import pytest
import torch

from dsla.errors import DataError
from dsla.evals.haystack import Haystack, made_up, made_up_name
from dsla.evals.subject import Subject
from dsla.evals.synthetic import copy_task, key_value_task, multi_needle_task, passkey_task
from dsla.evals.task import Task
from tests.evals.tiny import subject

BOOK = " ".join(f"This is sentence number {i} of the book." for i in range(900))
TASKS = {
    "passkey": lambda length: passkey_task(length, 10, Haystack([BOOK])),
    "multi_needle": lambda length: multi_needle_task(length, 8, Haystack()),
    "key_value": lambda length: key_value_task(length, 5),
}


class Reader:
    """In the place of a model: keeps what it was asked, and knows what it is told to know."""

    def __init__(self, model: Subject, right: bool = True) -> None:
        self.encode, self.decode, self.right = model.encode, model.tokenizer.decode, right
        self.asked: list[tuple[str, list[str], int]] = []

    def log_likelihoods(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        texts = [self.decode(c) for c in continuations]
        self.asked.append((self.decode(context), texts, len(context) + len(continuations[0])))
        return [(-1.0 - (i == 0) * (1 - 2 * self.right), self.right and i == 0) for i in range(len(continuations))]


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject()


def ask(task: Task, model: Subject, right: bool = True) -> tuple[Reader, list]:  # type: ignore[type-arg]
    reader = Reader(model, right)
    return reader, list(task.run(reader, frozenset()))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [600, 1500])
@pytest.mark.parametrize("name", TASKS)
def test_answer_is_in_the_context_and_the_context_as_long_as_it_should_be(
    model: Subject, name: str, length: int
) -> None:
    task = TASKS[name](length)
    reader, items = ask(task, model)
    assert len(items) == task.items and len({item.id for item in items}) == task.items
    for context, (answer, *others), size in reader.asked:
        assert answer in context and answer not in others and len(others) >= 3
        assert len(set(others)) == len(others)
        assert length - 100 <= size <= length
        if name == "passkey":
            assert size == length and all(other not in context for other in others)
    assert len({context for context, _, _ in reader.asked}) == task.items
    again, _ = ask(TASKS[name](length), model)
    assert again.asked == reader.asked, "questions follow from seeds"


def test_passkeys_are_at_every_depth(model: Subject) -> None:
    reader, items = ask(passkey_task(1500, 5, Haystack([BOOK])), model)
    places = [context.index("The pass key is") / len(context) for context, _, _ in reader.asked]
    assert places == sorted(places) and places[0] < 0.1 and places[-1] > 0.8
    assert [list(item.details["parts"]) for item in items] == [[f"depth {d}%"] for d in (0, 25, 50, 75, 100)]


def test_multi_needle_asks_for_one_of_several(model: Subject) -> None:
    reader, _ = ask(multi_needle_task(1500, 4, Haystack()), model)
    for i, (context, (answer, *others), _) in enumerate(reader.asked):
        found = re.findall(r"The number of (\w+) is (\d+)\.", context)
        name = re.search(r"What is the number of (\w+)\?", context)
        assert name and len(found) == 4 and found[i] == (name[1], answer.strip())
        assert {n for _, n in found} - {answer.strip()} <= {other.strip() for other in others}


def test_key_value_asks_for_one_of_the_list(model: Subject) -> None:
    reader, _ = ask(key_value_task(900, 5), model)
    for at, (context, (answer, *_), _) in enumerate(reader.asked):
        found = re.findall(r"(\w+ \w+): (\d+)\n", context)
        name = context.rstrip(":").split("\n")[-1]
        assert dict(found)[name] == answer.strip() and len(dict(found)) == len(found)
        assert [key for key, _ in found].index(name) == round((len(found) - 1) * at / 4)


@pytest.mark.parametrize(("right", "score"), [(True, 1.0), (False, 0.0)])
def test_score_is_whether_the_answer_would_be_written(model: Subject, right: bool, score: float) -> None:
    _, items = ask(passkey_task(600, 5, Haystack()), model, right)
    assert [item.score for item in items] == [score] * 5
    assert [item.details["choice"] for item in items] == [score] * 5


def test_copy_counts_names_that_are_copied_whole(model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def all_but_one_token(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        texts.append(model.tokenizer.decode(ids))
        assert len(ids) <= 300
        best = torch.ones(len(ids) - 1, dtype=torch.bool)
        best[: len(ids) // 2] = best[-1] = False
        return torch.zeros(len(ids) - 1), best

    monkeypatch.setattr(model, "token_scores", all_but_one_token)
    items = list(copy_task(300, 3).run(model, frozenset()))
    for text, item in zip(texts, items, strict=True):
        first, second = text.split("\n")
        assert first == second and len(set(first.split())) == len(first.split())
        assert item.weight == len(first.split()) - 4
        assert item.score == pytest.approx(1 - 1 / item.weight)
    assert len(set(texts)) == 3


def test_tasks_run_on_a_model_and_leave_out_what_is_done(model: Subject) -> None:
    for task in (*(make(500) for make in TASKS.values()), copy_task(100, 4)):
        items = list(task.run(model, frozenset()))
        assert list(task.run(model, frozenset(item.id for item in items[:-2]))) == items[-2:]
        assert all(0 <= item.score <= 1 for item in items)


def test_too_short_a_length_is_refused(model: Subject) -> None:
    short = (
        passkey_task(40, 1, Haystack()),
        multi_needle_task(40, 1, Haystack()),
        key_value_task(40, 1),
        copy_task(30, 1),
    )
    for task in short:
        with pytest.raises(DataError, match="tokens are too few"):
            list(task.run(model, frozenset()))


def test_haystack_is_text_around_the_end_of_a_sentence(model: Subject) -> None:
    before, after = Haystack([BOOK]).around(model.encode, 50, 70, random.Random(1))
    assert (len(before), len(after)) == (50, 70)
    first, second = model.tokenizer.decode(before), model.tokenizer.decode(after)
    assert first.endswith(".") and second.startswith(" This is sentence") and first + second in BOOK
    short = Haystack(["Only this. And that."]).around(model.encode, 90, 0, random.Random(1))
    assert (len(short[0]), len(short[1])) == (90, 0)


def test_made_up_text_is_varied() -> None:
    text = made_up(random.Random(0), 4000)
    sentences = text.split(". ")
    assert len(text) >= 4000 and len(set(sentences)) > 0.9 * len(sentences)
    assert len({made_up_name(random.Random(i)) for i in range(100)}) > 95
