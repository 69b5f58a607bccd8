"""Where training text comes from, and in which shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsla.distill.data.files import text_files
from dsla.errors import DataError

_TEACHER = "teacher:"


@dataclass(frozen=True)
class Source:
    """Text that is there.

    Attributes:
        path: a file or folder, as `text_files` takes it.
        weight: its part of the training tokens, relative to the other sources'; None = its documents count like all others.
    """

    path: Path
    weight: float | None = None


@dataclass(frozen=True)
class TeacherText:
    """Text that the teacher is to write itself.

    Attributes:
        tokens: how many.
        weight: as of `Source`.
    """

    tokens: int
    weight: float | None = None


def parse_source(text: str) -> Source | TeacherText:
    """A source as the command line names it: `PATH`, `PATH=WEIGHT`, `teacher:TOKENS` or `teacher:TOKENS=WEIGHT`.

    A file whose own name ends like a weight is taken as it is.

    Raises:
        DataError: if the weight or the number of tokens is none.
    """
    if Path(text).exists():
        return Source(Path(text))
    name, equals, share = text.rpartition("=")
    weight = _number(share, text) if equals else None
    name = name if equals else text
    if not name.startswith(_TEACHER):
        return Source(Path(name), weight)
    count = name.removeprefix(_TEACHER)
    if not count.replace("_", "").isdecimal() or not int(count):
        raise DataError(f"--data {text}: expected {_TEACHER}TOKENS with a whole number of tokens, found {count!r}")
    return TeacherText(int(count), weight)


def check_sources(sources: Sequence[Source | TeacherText], tokens: int = 0) -> None:
    """Checks what can be checked before anything is read or written.

    Args:
        sources: of a conversion or measurement.
        tokens: how many it needs.

    Raises:
        DataError: if there are none, a path is not there or of another type, only some have weights, or the teacher is to write
            more than once, or less than its share.
    """
    shares = _shares(sources)
    written = [(i, source.tokens) for i, source in enumerate(sources) if isinstance(source, TeacherText)]
    if len(written) > 1:
        raise DataError(f"--data {_TEACHER}TOKENS is given twice: name all tokens at once")
    if written and (shares or len(sources) == 1):
        place, found = written[0]
        needed = math.ceil(tokens * (shares[place] if shares else 1))
        if found < needed:
            raise DataError(f"the recipe needs {needed} tokens of the teacher, --data asks for {_TEACHER}{found}")
    text_files([source.path for source in sources if isinstance(source, Source)])


def mixture(sources: Sequence[Source]) -> list[tuple[float, list[Path]]]:
    """Parts of the training text: share of the tokens and where they come from. Sources without weights are one part.

    Raises:
        DataError: as `check_sources`.
    """
    shares = _shares(sources)
    if shares is None:
        return [(1.0, [source.path for source in sources])]
    return [(share, [source.path]) for share, source in zip(shares, sources, strict=True)]


def source_files(sources: Sequence[Source]) -> list[tuple[Path, float | None]]:
    """Every file of the sources with its source's weight.

    Raises:
        DataError: as `text_files`.
    """
    return [(file, source.weight) for source in sources for file in text_files([source.path])]


def _shares(sources: Sequence[Source | TeacherText]) -> list[float] | None:
    weights = [source.weight for source in sources if source.weight is not None]
    if not sources:
        raise DataError("no training data is given")
    if weights and len(weights) < len(sources):
        bare = next(source for source in sources if source.weight is None)
        name = bare.path if isinstance(bare, Source) else f"{_TEACHER}{bare.tokens}"
        raise DataError(f"{name} has no weight, but other data has: give every one a weight, or none")
    return [weight / sum(weights) for weight in weights] if weights else None


def _number(share: str, text: str) -> float:
    try:
        weight = float(share)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(
            f"--data {text}: no such file, and {share!r} is no weight: expected PATH or PATH=WEIGHT, above 0"
        )
    return weight
