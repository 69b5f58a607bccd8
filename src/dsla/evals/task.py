"""What a task is: something that scores a model at one level, item by item. No models and no files here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsla.evals.subject import Subject


@dataclass(frozen=True)
class Item:
    """One scored item: a question, a window of text, a prompt. Items are what intervals resample and pair levels by.

    Attributes:
        id: unique within its task, the same at every level.
        score: in the task's unit.
        weight: how much it counts in the task's mean; of `nll` the number of tokens it is the mean of.
        details: plain JSON data for who looks closer. `parts`, if there, breaks the item down for the report: label (`4k-8k`,
            `depth 50%`) -> `[score, weight]`.
    """

    id: str
    score: float
    weight: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: a name, a unit, and how to run it.

    Attributes:
        name: as `hellaswag`, `perplexity/wikitext2`, `passkey/4096`.
        group: `perplexity`, `commonsense`, `knowledge`, `long`, `synthetic` or `generation`.
        metric: unit of the scores: `accuracy`, `f1`, `rougeL`, `nll` (nats a token), `kl` (nats a token), ...
        run: given a subject already set to a level and the ids of items that are scored already, yields the other items in a
            fixed order. What an item scores may depend on the subject alone, never on which items ran before.
        items: how many there are.
        chance: what guessing scores.
        higher_is_better: whether more is better.
        min_teacher: a teacher that scores no more than this cannot show what a level loses: the task is left out of judgement.
        tokens: longest context an item needs, in tokens, what is generated included; 0 = not known beforehand.
        reads: tokens all items read in all, for the estimate of time; 0 = not known.
        writes: tokens all items generate one by one, at most.
    """

    name: str
    group: str
    metric: str
    run: Callable[[Subject, frozenset[str]], Iterator[Item]]
    items: int
    chance: float = 0.0
    higher_is_better: bool = True
    min_teacher: float = 0.0
    tokens: int = 0
    reads: int = 0
    writes: int = 0
