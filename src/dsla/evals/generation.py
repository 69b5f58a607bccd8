"""Quality of what a level writes, which likelihoods of given text do not show: repetition, variety, likeness to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dsla.evals.records import read_records
from dsla.evals.subject import Subject
from dsla.evals.task import Item, Task

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Give me three tips for learning a new language.",
    "What is the difference between a comet and an asteroid?",
    "Write a polite email asking a colleague to move a meeting to Thursday.",
    "Describe how bread is made, step by step.",
    "Summarise the plot of a fairy tale you know in five sentences.",
    "Which things should I pack for a week of hiking in the mountains?",
    "Write a poem about the first snow of the year.",
    "How does a bicycle stay upright while it is moving?",
    "Compare tea and coffee: name two advantages of each.",
    "Write a Python function that counts the words in a text, and say how it works.",
    "What should someone think about before they adopt a dog?",
    "Describe a busy market square to somebody who has never seen one.",
    "Why do leaves change their colour in autumn?",
    "Plan a simple dinner for four people and list what to buy.",
)
"""Prompts for where no file of them is given."""

_REPEATED = 4


class Writing:
    """What each level writes to a prompt, written once for all tasks that look at it.

    Args:
        prompts: what is asked.
        max_tokens: tokens of an answer, at most.
    """

    def __init__(self, prompts: Sequence[str], max_tokens: int) -> None:
        self.prompts, self.max_tokens = prompts, max_tokens
        self._written: dict[tuple[object, int], list[int]] = {}
        self._compared: dict[tuple[object, int], dict[str, tuple[float, float]]] = {}

    def prompt(self, subject: Subject, i: int) -> list[int]:
        """Token ids of a prompt: as a chat where the tokenizer has a template, else as it is."""
        text = self.prompts[i]
        if subject.tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = subject.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # A level's answer must fit behind it.
        return subject.encode(text)[-(subject.context - self.max_tokens) :]

    def answer(self, subject: Subject, i: int) -> list[int]:
        """What the subject writes, as it is set."""
        key = (subject.setting, i)
        if key not in self._written:
            self._written[key] = subject.generate(self.prompt(subject, i), self.max_tokens)
        return self._written[key]

    def teachers(self, subject: Subject, i: int) -> list[int]:
        """What level 0 writes."""
        with subject.teacher():
            return self.answer(subject, i)

    def compared(self, subject: Subject, i: int) -> dict[str, tuple[float, float]]:
        """Along the teacher's text, each with the number of tokens: KL(teacher || subject) in nats a token, and how often both
        have the same most likely token."""
        key = (subject.setting, i)
        if key not in self._compared:
            self._compared[key] = self._compare(subject, i)
        return self._compared[key]

    def _compare(self, subject: Subject, i: int) -> dict[str, tuple[float, float]]:
        prompt, text = self.prompt(subject, i), self.teachers(subject, i)
        if not text:
            return {"kl": (0.0, 1.0), "top1": (1.0, 1.0)}
        ids, first = [*prompt, *text[:-1]], len(prompt) - 1
        own = subject.logits(ids, first).log_softmax(-1)
        with subject.teacher():
            teachers = subject.logits(ids, first).log_softmax(-1)
        divergence = torch.nn.functional.kl_div(own, teachers, log_target=True, reduction="none").sum(-1)
        same = own.argmax(-1) == teachers.argmax(-1)
        return {"kl": (float(divergence.mean()), len(text)), "top1": (float(same.double().mean()), len(text))}


def repetition(tokens: Sequence[int], n: int = _REPEATED) -> float:
    """Share of the runs of `n` tokens that were there before; 0 where there is no run."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Share of the runs of `n` tokens that are different ones (distinct-n, arXiv 1510.03055); 0 where there is no run."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def agreement(tokens: Sequence[int], teachers: Sequence[int]) -> float:
    """Share of places with the teacher's token, of the longer text; 1 for two empty ones."""
    longer = max(len(tokens), len(teachers))
    return sum(a == b for a, b in zip(tokens, teachers, strict=False)) / longer if longer else 1.0


def generation_tasks(prompts: Sequence[str] = PROMPTS, max_tokens: int = 64) -> list[Task]:
    """The tasks on chat prompts.

    `agreement` compares a level's own greedy text with the teacher's, token by token; `kl` and `top1` read the teacher's text
    and compare what the two foresee at each of its tokens; `repetition` and `distinct2` look at a level's text alone.

    Args:
        prompts: what is asked.
        max_tokens: tokens of an answer, at most.
    """
    writing = Writing(prompts, max_tokens)

    def of_text(measure: Callable[[list[int]], float]) -> Callable[[Subject, int], tuple[float, float]]:
        return lambda subject, i: (measure(writing.answer(subject, i)), 1.0)

    def likeness(subject: Subject, i: int) -> tuple[float, float]:
        return agreement(writing.answer(subject, i), writing.teachers(subject, i)), 1.0

    def along(kind: str) -> Callable[[Subject, int], tuple[float, float]]:
        return lambda subject, i: writing.compared(subject, i)[kind]

    measures: dict[str, tuple[str, bool, Callable[[Subject, int], tuple[float, float]]]] = {
        "agreement": ("agreement", True, likeness),
        "repetition": ("repetition", False, of_text(repetition)),
        "distinct2": ("distinct-2", True, of_text(distinct)),
        "kl": ("kl", False, along("kl")),
        "top1": ("agreement", True, along("top1")),
    }
    return [
        Task(
            name=f"generation/{name}",
            group="generation",
            metric=metric,
            run=_run(score, len(prompts)),
            items=len(prompts),
            higher_is_better=better,
            writes=len(prompts) * max_tokens if name == "agreement" else 0,
            reads=len(prompts) * max_tokens * 4 if name == "kl" else 0,
        )  # fmt: skip
        for name, (metric, better, score) in measures.items()
    ]


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """The first turns of a file of chat prompts (keys `id` and `turns`).

    Raises:
        DataError: it cannot be read, or a record does not fit.
    """
    return [str(record["turns"][0]) for record in read_records(path, {"id": str, "turns": list}, limit)]


def _run(score: Callable[[Subject, int], tuple[float, float]], count: int) -> Callable[..., Iterator[Item]]:
    def run(subject: Subject, done: frozenset[str]) -> Iterator[Item]:
        for i in range(count):
            if str(i) not in done:
                value, weight = score(subject, i)
                yield Item(str(i), value, weight)

    return run
