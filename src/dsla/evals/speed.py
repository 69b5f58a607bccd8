"""How fast each level reads and writes, and what memory a request takes, on the face that is evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsla.evals.subject import Subject
from dsla.families import attention_shape
from dsla.mixers import SoftmaxMixer
from dsla.schema import from_data

_READ = 1024
_WRITTEN = 16
_ROUNDS = 3


@dataclass(frozen=True)
class Rate:
    """Tokens a second: the median of the rounds, and the slowest and fastest."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """Speed of one level.

    Attributes:
        read: tokens of the context that was read.
        prefill: reading it.
        decode: writing one token after the other behind it.
    """

    read: int
    prefill: Rate
    decode: Rate


Speeds = Mapping[int, Speed]
"""Level -> speed."""


def measure_speed(subject: Subject, levels: Sequence[int]) -> dict[int, Speed]:
    """Times every level in turn, several rounds, so that what else the machine does meanwhile meets all of them."""
    read = min(_READ, subject.context - _WRITTEN)
    ids = torch.randint(subject.model.config.vocab_size, (read,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[int, list[tuple[float, float]]] = {level: [] for level in levels}
    for _ in range(_ROUNDS):
        for level in levels:
            subject.set(level)
            times[level].append(_time(subject, ids))
    subject.set(0)
    return {
        level: Speed(read, _rate(read, [x for x, _ in rounds]), _rate(_WRITTEN, [x for _, x in rounds]))
        for level, rounds in times.items()
    }


def speeds_to_json(speeds: Speeds) -> dict[str, Any]:
    """As plain data."""
    return {str(level): asdict(speed) for level, speed in speeds.items()}


def speeds_from_json(data: Mapping[str, Any]) -> dict[int, Speed]:
    """What `speeds_to_json` gave.

    Raises:
        ConfigError: it is something else.
    """
    return {int(level): from_data(Speed, speed, f"speed of level {level}") for level, speed in data.items()}


def weight_bytes(subject: Subject) -> tuple[int, int]:
    """Bytes of the teacher's weights (shared ones once), and of the whole adapter's, as they are in memory."""
    subject.set(0)
    own = {id(p): p.numel() * p.element_size() for p in subject.model.parameters()}
    mixers = subject.levels.mixers.values() if subject.levels else ()
    return sum(own.values()), sum(p.numel() * p.element_size() for mixer in mixers for p in mixer.parameters())


def request_bytes(subject: Subject, level: int, tokens: int) -> int:
    """Bytes that one request of `tokens` tokens keeps at a level: KV caches of some layers, states of the converted ones."""
    layers: int = subject.model.config.num_hidden_layers
    kv = SoftmaxMixer(attention_shape(subject.model.config)).state_spec(subject.dtype).bytes_per_token
    mixers = list(subject.levels.mixers.values())[:level] if subject.levels else []
    return (layers - level) * kv * tokens + sum(mixer.state_spec(subject.dtype).fixed_bytes for mixer in mixers)


def _time(subject: Subject, ids: list[int]) -> tuple[float, float]:
    """Seconds of reading `ids` and of writing behind them."""
    _wait(subject)
    start = time.perf_counter()
    prefix = subject.read(ids)
    _wait(subject)
    middle = time.perf_counter()
    subject.generate(prefix, _WRITTEN, ends=frozenset())
    _wait(subject)
    return middle - start, time.perf_counter() - middle


def _wait(subject: Subject) -> None:
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    rates = [tokens / max(x, 1e-9) for x in seconds]
    return Rate(statistics.median(rates), min(rates), max(rates))
