"""Made-up tests of memory: what a context said once must be said again. By length and by depth, seeds fixed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dsla.errors import DataError
from dsla.evals.haystack import Encode, Haystack, made_up_name
from dsla.evals.subject import Subject
from dsla.evals.task import Item, Task

_DEPTHS = (0, 25, 50, 75, 100)
_MIN_TEACHER = 0.3
_CANDIDATES = 10
_NEEDLES = 4
_COPY_START = 4
_ASK_KEY = "\nFrom the list above, the number of {} again:\n\n{}:"


@dataclass(frozen=True)
class Question:
    """A context, what must come next, and what must not.

    Attributes:
        context: token ids.
        answer: token ids that must follow.
        others: token ids of wrong answers.
        labels: parts of the report it counts in.
    """

    context: list[int]
    answer: list[int]
    others: list[list[int]]
    labels: tuple[str, ...] = field(default_factory=tuple)


Build = Callable[[Encode, int, random.Random], Question]
"""(encode, number of the item, draw) -> its question."""


def recall_task(name: str, length: int, items: int, build: Build) -> Task:
    """A task that is passed where greedy generation would write the answer.

    Greedy generation writes exactly the answer's tokens if and only if each of them is the most likely one after those
    before it, so one pass over context and answer tells, without generating. `choice` in an item's details says whether the
    answer was the most likely one of the candidates.

    Args:
        name: of the task; seeds follow from it.
        length: tokens of context and answer, at most.
        items: questions.
        build: makes a question.

    Returns:
        A task with metric `accuracy`.
    """

    def run(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        for i in range(items):
            if (key := str(i)) in done:
                continue
            question = build(subject.encode, i, random.Random(f"{name} {i}"))
            found = subject.log_likelihoods(question.context, [question.answer, *question.others])
            score, best = float(found[0][1]), max(range(len(found)), key=lambda at: found[at][0])
            parts = {label: [score, 1] for label in question.labels}
            yield Item(key, score, details={"choice": float(best == 0), "parts": parts})

    return Task(
        name=name, group="synthetic", metric="accuracy", run=run, items=items, min_teacher=_MIN_TEACHER, tokens=length,
        reads=items * length,
    )  # fmt: skip


def passkey_task(length: int, items: int, haystack: Haystack) -> Task:
    """A five-digit key in a long text, at depths from its beginning to its end."""

    def build(encode: Encode, i: int, draw: random.Random) -> Question:
        depth = _DEPTHS[i % len(_DEPTHS)]
        key, *wrong = draw.sample(range(10_000, 100_000), _CANDIDATES)
        head = encode("A pass key is hidden in the text below. Find it and remember it.\n\n")
        needle = encode(f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n")
        tail = encode("\n\nWhat is the pass key? The pass key is")
        answer, others = encode(f" {key}"), [encode(f" {other}") for other in wrong]
        room = _room(length, head, needle, tail, answer)
        before = round(room * depth / 100)
        text = haystack.around(encode, before, room - before, draw)
        return Question([*head, *text[0], *needle, *text[1], *tail], answer, others, (f"depth {depth}%",))

    return recall_task(f"passkey/{length}", length, items, build)


def multi_needle_task(length: int, items: int, haystack: Haystack) -> Task:
    """Several numbers spread over a long text, each with a name; one of them is asked for."""

    def build(encode: Encode, i: int, draw: random.Random) -> Question:
        asked = i % _NEEDLES
        names = [made_up_name(draw) for _ in range(_NEEDLES)]
        numbers = draw.sample(range(10_000, 100_000), _CANDIDATES)
        needles = [encode(f"\n\nThe number of {x} is {n}.\n\n") for x, n in zip(names, numbers, strict=False)]
        head = encode("Some people in the text below have a number. Remember the number of each of them.\n\n")
        tail = encode(f"\n\nWhat is the number of {names[asked]}? The number of {names[asked]} is")
        answer = encode(f" {numbers[asked]}")
        others = [encode(f" {number}") for number in numbers if number != numbers[asked]]
        room = _room(length, head, *needles, tail, answer)
        cuts = [room * (part + 1) // (_NEEDLES + 1) for part in range(_NEEDLES)]
        text = sum(haystack.around(encode, cuts[0], room - cuts[0], draw), [])
        context = list(head)
        for low, high, needle in zip([0, *cuts], [*cuts, room], [*needles, []], strict=True):
            context += [*text[low:high], *needle]
        return Question([*context, *tail], answer, others, (f"needle {asked + 1} of {_NEEDLES}",))

    return recall_task(f"multi_needle/{length}", length, items, build)


def key_value_task(length: int, items: int) -> Task:
    """A list of names and numbers that fills the context; the number of one name is asked for."""

    def build(encode: Encode, i: int, draw: random.Random) -> Question:
        depth = _DEPTHS[i % len(_DEPTHS)]
        head, lines, numbers = encode("Names and their numbers:\n\n"), dict[str, list[int]](), dict[str, int]()
        room, longest = length - len(head) - len(encode(_ASK_KEY)), 0
        while True:
            name, number = f"{made_up_name(draw)} {made_up_name(draw)}", draw.randrange(1000, 10_000)
            line = encode(f"{name}: {number}\n")
            longest = max(longest, len(line))
            # What is asked holds the name twice, and the answer its number.
            if room < len(line) + 3 * longest:
                break
            if name not in numbers and number not in numbers.values():
                room -= len(line)
                lines[name], numbers[name] = line, number
        if len(numbers) < 2:
            raise DataError(f"{length} tokens are too few for a list of names and numbers")
        name = list(numbers)[round((len(numbers) - 1) * depth / 100)]
        number = numbers[name]
        tail = encode(_ASK_KEY.format(name, name))
        wrong = draw.sample(sorted(set(numbers.values()) - {number}), min(_CANDIDATES, len(numbers)) - 1)
        context = [*head, *(token for line in lines.values() for token in line), *tail]
        others = [encode(f" {other}") for other in wrong]
        return Question(context, encode(f" {number}"), others, (f"depth {depth}%",))

    return recall_task(f"key_value/{length}", length, items, build)


def copy_task(length: int, items: int) -> Task:
    """Made-up names that are said twice: the share of the second time's names all of whose tokens are the most likely ones.

    The first few names of the second time, which say that something is repeated, do not count.
    """
    name, half = f"copy/{length}", length // 2

    def run(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        for i in range(items):
            if (key := str(i)) in done:
                continue
            draw, between, names = random.Random(f"{name} {i}"), subject.encode("\n"), list[list[int]]()
            room = half - len(between)
            while room >= 0:
                names.append(subject.encode(f" {made_up_name(draw)}"))
                room -= len(names[-1])
            names.pop()
            if len(names) <= _COPY_START:
                raise DataError(f"{length} tokens are too few to say names twice")
            once = sum(names, [])
            _, best = subject.token_scores([*once, *between, *once])
            at, copied = len(once) + len(between) - 1, list[bool]()
            for tokens in names:
                copied.append(bool(best[at : at + len(tokens)].all()))
                at += len(tokens)
            counted = copied[_COPY_START:]
            yield Item(key, sum(counted) / len(counted), len(counted))

    return Task(
        name=name, group="synthetic", metric="accuracy", run=run, items=items, min_teacher=_MIN_TEACHER,
        tokens=length, reads=items * length,
    )  # fmt: skip


def _room(length: int, *parts: list[int]) -> int:
    """Tokens left for ordinary text."""
    room = length - sum(map(len, parts))
    if room < 0:
        raise DataError(f"{length} tokens are too few: what is hidden and asked for takes {length - room}")
    return room
