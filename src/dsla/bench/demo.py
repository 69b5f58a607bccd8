"""The demo: several streams at once in less memory than they need at level 0, and what happened as data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsla.bench.records import origin
from dsla.bench.streams import Need, Stream
from dsla.engine import Engine, SamplingParams, StepOutput
from dsla.server.detokenize import Detokenizer, TokenBytes

_TEMPERATURE, _TOP_P = 0.7, 0.95


@dataclass(frozen=True)
class Sample:
    """The load after one step.

    Attributes:
        seconds: since the start.
        step_seconds: the step took.
        prompt_tokens: tokens of prompts it read.
        generated_tokens: tokens it wrote.
        kv_bytes: bytes of KV caches.
        state_bytes: bytes of states.
        level_0_bytes: bytes the running streams would take now, had no layer been converted.
        running: streams that run.
        waiting: streams that wait to be admitted.
        computed: tokens each stream has read and written so far.
        levels: level of each stream; one that has finished keeps its last.
        conversions: layers of streams converted since the start.
        freed_bytes: bytes that freed.
    """

    seconds: float
    step_seconds: float
    prompt_tokens: int
    generated_tokens: int
    kv_bytes: int
    state_bytes: int
    level_0_bytes: int
    running: int
    waiting: int
    computed: tuple[int, ...]
    levels: tuple[int, ...]
    conversions: int
    freed_bytes: int

    @property
    def used_bytes(self) -> int:
        """Bytes in use."""
        return self.kv_bytes + self.state_bytes

    @property
    def mean_level(self) -> float:
        """Mean level of the streams."""
        return sum(self.levels) / len(self.levels)

    @property
    def max_level(self) -> int:
        """Highest level of a stream."""
        return max(self.levels)


@dataclass(frozen=True)
class StreamResult:
    """How a stream ended.

    Attributes:
        title: title of its book.
        author: author of its book.
        prompt_tokens: tokens read.
        generated_tokens: tokens written.
        levels: level history, `[[from_token, level], ...]`.
        finish_reason: `length` or `stop` where it finished, else `abort`, `error`, or `none`.
        error: what went wrong, if something did.
        seconds: when it ended, since the start.
        text: what it wrote.
    """

    title: str
    author: str
    prompt_tokens: int
    generated_tokens: int
    levels: list[list[int]]
    finish_reason: str
    error: str | None
    seconds: float
    text: str

    @property
    def finished(self) -> bool:
        """Whether it wrote what it had to."""
        return self.finish_reason in ("length", "stop")


class Demo:
    """Runs streams that all arrive at once.

    Args:
        engine: an idle engine.
        tokenizer: its model's.
        streams: what to run.
        clock: seconds.

    Attributes:
        samples: one per step so far.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        streams: Sequence[Stream],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine, self.streams = engine, list(streams)
        self.samples: list[Sample] = []
        self._clock = clock
        self._table = TokenBytes.of(tokenizer)
        self._tokens: list[list[int]] = [[] for _ in self.streams]
        self._last: dict[int, tuple[float, StepOutput]] = {}
        self._levels = [0] * len(self.streams)
        self._computed = [0] * len(self.streams)

    def run(self) -> Iterator[Sample]:
        """Adds all streams and steps the engine until none is open; a sample per step.

        Raises:
            RequestError: a stream does not fit the model.
            EngineError: a stream does not fit the memory budget, or the engine failed.
        """
        for index, stream in enumerate(self.streams):
            params = SamplingParams(stream.max_tokens, _TEMPERATURE, _TOP_P, seed=index, ignore_eos=True)
            self.engine.add_request(stream.prompt, params, request_id=str(index))
        start = before = self._clock()
        read = written = 0
        while self.engine.has_work:
            outputs = self.engine.step()
            now = self._clock()
            for output in outputs:
                index = int(output.request_id)
                self._tokens[index] += output.tokens
                self._last[index] = (now - start, output)
            stats = self.engine.stats()
            self._update(outputs, stats)
            sample = self._sample(stats, now - start, now - before, read, written)
            before, read, written = now, stats["prompt_tokens"], stats["generated_tokens"]
            self.samples.append(sample)
            yield sample

    def results(self) -> list[StreamResult]:
        """How each stream ended, or stands now."""
        return [self._result(index, stream) for index, stream in enumerate(self.streams)]

    def text(self, index: int) -> str:
        """What a stream has written so far."""
        detokenizer = Detokenizer(self._table)
        return detokenizer.add(self._tokens[index]) + detokenizer.finish()

    def _update(self, outputs: list[StepOutput], stats: dict[str, Any]) -> None:
        for request in stats["requests"]:
            index = int(request["id"])
            self._levels[index], self._computed[index] = request["level"], request["computed_tokens"]
        for output in outputs:
            index = int(output.request_id)
            if output.finish_reason is not None and output.levels:
                self._levels[index] = output.levels[-1][1]
                self._computed[index] = output.prompt_tokens + output.completion_tokens

    def _sample(self, stats: dict[str, Any], seconds: float, step_seconds: float, read: int, written: int) -> Sample:
        arena, layers = self.engine.arena, self.engine.decoder.n_layers
        computed = [request["computed_tokens"] for request in stats["requests"] if request["status"] == "running"]
        return Sample(
            seconds=seconds,
            step_seconds=step_seconds,
            prompt_tokens=stats["prompt_tokens"] - read,
            generated_tokens=stats["generated_tokens"] - written,
            kv_bytes=stats["kv_bytes"],
            state_bytes=stats["state_bytes"],
            level_0_bytes=sum(arena.page_count(count) for count in computed) * layers * arena.page_bytes,
            running=stats["running"],
            waiting=stats["waiting"],
            computed=tuple(self._computed),
            levels=tuple(self._levels),
            conversions=sum(stats["conversions"].values()),
            freed_bytes=sum(event["freed_bytes"] for event in stats["events"] if event["kind"] == "level"),
        )

    def _result(self, index: int, stream: Stream) -> StreamResult:
        seconds, output = self._last.get(index, (0.0, None))
        return StreamResult(
            title=stream.title,
            author=stream.author,
            prompt_tokens=len(stream.prompt),
            generated_tokens=len(self._tokens[index]),
            levels=output.levels if output else [],
            finish_reason=(output.finish_reason if output else None) or "none",
            error=output.error if output else None,
            seconds=seconds,
            text=self.text(index),
        )


def record(demo: Demo, need: Need, model: str) -> dict[str, Any]:
    """All of a run, as plain data: date, command, settings, versions, machine, streams and samples.

    Args:
        demo: a demo that has run.
        need: memory of its streams.
        model: name of the model.
    """
    decoder, arena = demo.engine.decoder, demo.engine.arena
    return {
        **origin(),
        "settings": {
            "model": model,
            "levels": len(decoder.order),
            "layers": decoder.n_layers,
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "budget_bytes": arena.budget_bytes,
            "page_tokens": arena.page_tokens,
            "page_bytes": arena.page_bytes,
            "state_bytes_per_layer": arena.slot_units * arena.page_bytes,
            "max_step_tokens": demo.engine.config.max_step_tokens,
        },
        "need_bytes": asdict(need),
        "streams": [asdict(result) | {"finished": result.finished} for result in demo.results()],
        "samples": [
            asdict(sample) | {"mean_level": sample.mean_level, "max_level": sample.max_level} for sample in demo.samples
        ],
    }
