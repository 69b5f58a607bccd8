"""How near a text that was written is to an accepted answer: each gives a score from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as SQuAD compares answers (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(written: str, answer: str) -> float:
    """Whether they are the same when normalised."""
    return float(normalised(written) == normalised(answer))


def qa_f1(written: str, answer: str) -> float:
    """F1 of the words they share when normalised, as SQuAD's."""
    found, expected = normalised(written).split(), normalised(answer).split()
    if not found or not expected:
        return float(found == expected)
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected))


def substring(written: str, answer: str) -> float:
    """Whether the answer occurs, both normalised."""
    wanted = normalised(answer)
    return float(bool(wanted) and wanted in normalised(written))


def rouge_l(written: str, answer: str) -> float:
    """F-measure of the longest common subsequence of stemmed words (ROUGE-L, Lin 2004)."""
    return float(_rouge().score(answer, written)["rougeL"].fmeasure)


def edit_sim(written: str, answer: str) -> float:
    """Share of characters that need not be inserted or deleted; spaces at the end do not count."""
    from rapidfuzz import fuzz

    return fuzz.ratio(written.rstrip(), answer.rstrip()) / 100


def first_label(written: str, labels: Sequence[str]) -> str | None:
    """The label a text begins with, the longest if several do, whatever the case."""
    text = written.strip().casefold()
    return max((label for label in labels if text.startswith(label.casefold())), key=len, default=None)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
