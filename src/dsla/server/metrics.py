"""`/metrics`: what the engine and the HTTP side count, in the words of Prometheus.

Names that begin with `vllm:` mean what they mean in vLLM, which has more of them; `dsla_` are our own. Nothing is counted
here but answers: all else is read from `AsyncEngine.stats` when somebody asks.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dsla import __version__
from dsla.engine import AsyncEngine

Stats = Mapping[str, Any]
Reader = Callable[[Stats], float]
Labelled = Callable[[Stats], Mapping[str, float]]

GAUGES: dict[str, tuple[str, Reader]] = {
    "vllm:num_requests_running": ("Requests that are being computed.", lambda s: s["running"]),
    "vllm:num_requests_waiting": ("Requests in the queue.", lambda s: s["waiting"]),
    "vllm:kv_cache_usage_perc": (
        "Part of the memory budget that running requests hold, in KV pages and states; 1 = all.",
        lambda s: 1 - s["free_bytes"] / s["budget_bytes"],
    ),
    "dsla_memory_budget_bytes": ("Budget of KV pages, states and snapshots.", lambda s: s["budget_bytes"]),
    "dsla_parked_bytes": ("Memory beside the budget that parked requests take.", lambda s: s["parked_bytes"]),
    "dsla_snapshots": ("Prefixes kept for later requests.", lambda s: s["snapshots"]),
    "dsla_new_request_level": ("Level that requests which save memory by it start at.", lambda s: s["new_level"]),
    "dsla_max_level": ("Highest level of the model.", lambda s: s["max_level"]),
    "dsla_ready": ("1 = takes requests: warm, neither draining nor stopped.", lambda s: s["state"] == "ready"),
}
"""Name -> what it is, and its value."""

LABELLED_GAUGES: dict[str, tuple[str, str, Labelled]] = {
    "dsla_requests_running_by_level": (
        "Running requests, by how many of their layers are converted.",
        "level",
        lambda s: Counter(str(request["level"]) for request in s["requests"] if request["status"] == "running"),
    ),
    "dsla_memory_bytes": (
        "The memory budget by use: KV pages and states of running requests, snapshots, which are given up on demand, unused.",
        "use",
        lambda s: {
            "kv": s["kv_bytes"],
            "states": s["state_bytes"],
            "snapshots": s["cached_bytes"],
            "unused": s["free_bytes"] - s["cached_bytes"],
        },
    ),
}
"""Name -> what it is, its label, and its value by the label's values."""

COUNTERS: dict[str, tuple[str, Reader]] = {
    "vllm:prompt_tokens": ("Prompt tokens of requests that got a first token.", lambda s: s["asked_tokens"]),
    "vllm:generation_tokens": ("Tokens generated.", lambda s: s["generated_tokens"]),
    "vllm:prefix_cache_queries": ("Prompt tokens looked for among kept prefixes.", lambda s: s["asked_tokens"]),
    "vllm:prefix_cache_hits": ("Prompt tokens that an earlier request had computed.", lambda s: s["cached_tokens"]),
    "vllm:num_preemptions": ("Times a running request had to give way.", lambda s: sum(s["preemptions"].values())),
    "dsla_computed_prompt_tokens": ("Prompt tokens computed, replays included.", lambda s: s["prompt_tokens"]),
    "dsla_steps": ("Steps of the engine.", lambda s: s["steps"]),
}
"""Name without `_total` -> what it is, and its value."""

LABELLED_COUNTERS: dict[str, tuple[str, str, Labelled]] = {
    "vllm:request_success": (
        "Requests that ended, by why; abort: cancelled or left by the client.",
        "finished_reason",
        lambda s: {"stop": 0, "length": 0, "abort": 0, "error": 0} | _renamed(s["finished"], {"cancel": "abort"}),
    ),
    "dsla_conversions": (
        "Layers of running requests converted while they ran, by what asked for it.",
        "reason",
        lambda s: s["conversions"],
    ),
    "dsla_preemptions": (
        "Times a running request had to give way, by what became of what it remembered.",
        "how",
        lambda s: {"parked": 0, "replayed": 0} | _renamed(s["preemptions"], {"to be replayed": "replayed"}),
    ),
}
"""Name without `_total` -> what it is, its label, and its value by the label's values."""

HISTOGRAMS: dict[str, tuple[str, str]] = {
    "vllm:request_queue_time_seconds": ("Time in the queue before the first start.", "queue"),
    "vllm:time_to_first_token_seconds": ("Time from acceptance to the first token.", "ttft"),
    "vllm:inter_token_latency_seconds": ("Time from one token of a request to its next.", "itl"),
    "vllm:request_time_per_output_token_seconds": ("Mean time between tokens, of requests that ended.", "tpot"),
    "vllm:e2e_request_latency_seconds": ("Time from acceptance to the last token.", "e2e"),
    "dsla_fold_seconds": ("Time to convert one layer of a running request.", "fold"),
}
"""Name -> what it is, and its key in `stats()["times"]`."""


class Metrics(Collector):
    """Writes the metrics of one application, in a registry of its own.

    Args:
        engine: where they come from.
        model_name: the label `model_name` of all of them.
    """

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine, self._model = engine, model_name
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, str]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer: the template of its route, its HTTP status, and how long it took."""
        with self._lock:
            self._answers[route, str(status)] += 1
            self._seconds[route] += seconds

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that an `Accept` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Reads all metrics of this module."""
        stats, model = self._engine.stats(events_after=None, most_waiting=0), self._model
        for name, (text, read) in GAUGES.items():
            yield _family(GaugeMetricFamily, name, text, [], {(model,): read(stats)})
        for name, (text, read) in COUNTERS.items():
            yield _family(CounterMetricFamily, name, text, [], {(model,): read(stats)})
        for name, (text, label, read_all) in LABELLED_GAUGES.items():
            yield _family(GaugeMetricFamily, name, text, [label], {(model, k): v for k, v in read_all(stats).items()})
        for name, (text, label, read_all) in LABELLED_COUNTERS.items():
            yield _family(CounterMetricFamily, name, text, [label], {(model, k): v for k, v in read_all(stats).items()})
        for name, (text, key) in HISTOGRAMS.items():
            yield _histogram(name, text, model, stats["times"][key])
        with self._lock:
            answers, seconds = dict(self._answers), dict(self._seconds)
        yield _family(
            CounterMetricFamily, "dsla_http_answers", "Answers, by route and HTTP status; 499: the client had left.",
            ["route", "status"], {(model, *labels): count for labels, count in answers.items()},
        )  # fmt: skip
        yield _family(
            CounterMetricFamily, "dsla_http_seconds", "Time of answers, by route.",
            ["route"], {(model, route): value for route, value in seconds.items()},
        )  # fmt: skip
        info = GaugeMetricFamily("dsla_info", "1; the version is in the label.", labels=["model_name", "version"])
        info.add_metric([model, __version__], 1)
        yield info


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    labels: list[str],
    values: Mapping[tuple[str, ...], float],
) -> Metric:
    family = kind(name, text, labels=["model_name", *labels])
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _histogram(name: str, text: str, model: str, times: Mapping[str, Any]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["model_name"])
    bounds = [floatToGoString(bound) for bound in (*times["bounds"], float("inf"))]
    family.add_metric([model], list(zip(bounds, accumulate(times["counts"]), strict=True)), times["sum"])
    return family


def _renamed(counts: Mapping[str, int], names: Mapping[str, str]) -> dict[str, float]:
    return {names.get(key, key): count for key, count in counts.items()}
