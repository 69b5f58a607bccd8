"""What levels give the engine on the default model: more requests in the same bytes, faster steps, cheap conversion.

    pip install -e '.[all]' && python benchmarks/engine_bars.py

Levels are measured in turn within every round, in one process: through `Engine`, as a server drives it, and where steps of
one kind are compared through its decoder. Results go to `engine.json` in the folder of this kind of processor in
`benchmarks/results/`; ratios are medians over rounds.
`--quick` takes short prompts, to see that all works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import digest, engine_results, origin

from dsla.bench.crossover import STEPS, Room
from dsla.bench.roofline import read_bandwidth
from dsla.engine import Engine, EngineConfig, PackedDecoder, SamplingParams, StepOutput
from dsla.engine.cost import CostModel
from dsla.engine.measure import load_or_measure
from dsla.server.build import EngineSettings, build_engine
from dsla.storage import write_json

SMALL = 16 << 20
LEVELS = (0, 23)
CONVERTED = 15
STEP_SECONDS = 0.25
TURN, ANSWER = 64, 24
HOLDERS = 4
BATCH = 8
WARM_UP = 2
AHEAD = 24
"""Tokens that requests write while the last prompts are read; then come the measured steps."""


class Measured:
    """An engine at one level whose steps are timed.

    Args:
        decoder: the model.
        budget_bytes: of its memory.
        level: of all requests.
        step_tokens: tokens of a step, at most.
        cache: whether ended requests are kept for those that begin alike.
        step_seconds: time of a step, at most; None = no bound.
        cost: what steps take, with such a bound.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        budget_bytes: int,
        level: int,
        step_tokens: int,
        *,
        cache: bool = False,
        step_seconds: float | None = None,
        cost: CostModel | None = None,
    ) -> None:
        config = EngineConfig(
            max_step_tokens=step_tokens,
            level=level,
            cache_bytes=None if cache else 0,
            max_step_seconds=step_seconds,
        )
        self.engine = Engine(decoder, decoder.arena(budget_bytes), config, cost=cost)

    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Adds a request that writes `max_tokens` tokens, whatever they are; its id."""
        return self.engine.add_request(prompt, SamplingParams(max_tokens, temperature=0.0, ignore_eos=True))

    def step(self) -> float:
        """Seconds of a step."""
        begun = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - begun

    def read_all(self) -> float:
        """Steps until every prompt is read; seconds.

        Raises:
            RuntimeError: a request waits: there is no room for it.
        """
        seconds = 0.0
        while True:
            requests = self.engine.stats()["requests"]
            if all(request["computed_tokens"] >= request["prompt_tokens"] for request in requests):
                return seconds
            seconds += self.step()
            if (stats := self.engine.stats())["waiting"] and not self._reads(stats):
                raise RuntimeError(f"{stats['waiting']} requests do not fit into {stats['budget_bytes']:,} bytes")

    @staticmethod
    def _reads(stats: dict[str, Any]) -> bool:
        return any(r["computed_tokens"] < r["prompt_tokens"] for r in stats["requests"] if r["status"] == "running")

    def close(self) -> None:
        """Ends all requests."""
        for request in self.engine.stats()["requests"]:
            self.engine.cancel(request["id"])


def prompts(decoder: PackedDecoder, count: int, tokens: int) -> list[list[int]]:
    """Random prompts."""
    found: list[list[int]] = np.random.default_rng(0).integers(0, decoder.vocab_size, (count, tokens)).tolist()
    return found


def equal_bytes(decoder: PackedDecoder, tokens: int, rounds: int) -> dict[str, Any]:
    """Decode of as many requests as fit into the bytes of four at level 0: the same bytes at both levels."""
    write = AHEAD + rounds + WARM_UP
    probe = decoder.arena(SMALL)
    pages = probe.page_count(tokens + write)
    units = HOLDERS * decoder.n_layers * pages
    engines, requests = {}, {}
    for level in LEVELS:
        one = (decoder.n_layers - level) * pages + level * probe.slot_units
        requests[level] = units // one
        engines[level] = Measured(decoder, units * probe.page_bytes, level, tokens + max(requests.values()) + 1)
        for prompt in prompts(decoder, requests[level], tokens):
            engines[level].add(prompt, write)
        engines[level].read_all()
        running = engines[level].engine.stats()["running"]
        if running != requests[level]:
            raise RuntimeError(f"{running} of {requests[level]} requests run at level {level}: some ended too early")
    seconds: dict[int, list[float]] = {level: [] for level in LEVELS}
    for _ in range(rounds + WARM_UP):
        for level in LEVELS:
            seconds[level].append(engines[level].step())
    used = {level: engine.engine.stats() for level, engine in engines.items()}
    rates = {level: requests[level] / statistics.median(seconds[level][WARM_UP:]) for level in LEVELS}
    return {
        "budget_bytes": units * probe.page_bytes,
        "used_bytes": {level: stats["kv_bytes"] + stats["state_bytes"] for level, stats in used.items()},
        "requests": requests,
        "step_seconds": seconds,
        "tokens_per_second": rates,
        "speed_ratio": rates[LEVELS[1]] / rates[LEVELS[0]],
        "request_ratio": requests[LEVELS[1]] / requests[LEVELS[0]],
    }


def conversion(decoder: PackedDecoder, tokens: int, rounds: int) -> dict[str, Any]:
    """Layers of a live request converted in bounded steps, against the prefill of its prompt at level 0."""
    write = 4 * STEPS
    probe = decoder.arena(SMALL)
    units = decoder.n_layers * probe.page_count(tokens + write) + 2 * probe.slot_units
    cost = load_or_measure(decoder)
    room = Room(decoder, 0, 1, tokens)
    prefills, folds, longest, counts = [], [], [], []
    (prompt,) = prompts(decoder, 1, tokens)
    for _ in range(rounds):
        prefills.append(room.prefill([tokens])[0])
        run = Measured(decoder, units * probe.page_bytes, 0, 512, step_seconds=STEP_SECONDS, cost=cost)
        run.add(prompt, write)
        run.read_all()
        plain = [run.step() for _ in range(STEPS)][WARM_UP:]
        run.engine.set_level(CONVERTED)
        steps = []
        while run.engine.stats()["requests"][0]["level"] < CONVERTED:
            steps.append(run.step())
        folds.append(sum(steps) - len(steps) * statistics.median(plain))
        longest.append(max(steps))
        counts.append(len(steps))
        run.close()
    return {
        "layers": CONVERTED,
        "step_bound_seconds": STEP_SECONDS,
        "prefill_seconds": prefills,
        "conversion_seconds": folds,
        "conversion_steps": counts,
        "longest_step_seconds": longest,
        "share": statistics.median(f / p for f, p in zip(folds, prefills, strict=True)),
    }


def second_turn(decoder: PackedDecoder, tokens: int, rounds: int) -> dict[str, Any]:
    """Time to the first token of a second turn, which begins with the first one and its answer, against a cold start."""
    first = tokens - TURN - ANSWER
    found: dict[str, Any] = {"new_tokens": TURN, "levels": {}}
    probe = decoder.arena(SMALL)
    slots = (len(decoder.order) + 1) * probe.slot_units
    units = 3 * (decoder.n_layers * probe.page_count(tokens + ANSWER) + slots)
    for level in sorted({*LEVELS, len(decoder.order)}):
        cold, warm, computed = [], [], []
        for turn in range(rounds):
            run = Measured(decoder, units * probe.page_bytes, level, 512, cache=True)
            prompt, new = prompts(decoder, 1, first)[0], prompts(decoder, 1, TURN + turn)[0]
            cold.append(_first_token(run, prompt)[0])
            name = run.add(prompt, ANSWER)
            answer = [token for out in _until_idle(run) if out.request_id == name for token in out.tokens]
            seconds, cached = _first_token(run, prompt + answer + new)
            warm.append(seconds)
            computed.append(first + len(answer) + len(new) - cached)
        found["levels"][level] = {
            "cold_seconds": cold,
            "second_turn_seconds": warm,
            "computed_tokens": computed,
            "share": statistics.median(w / c for w, c in zip(warm, cold, strict=True)),
        }
    return found | {"worst_share": max(each["share"] for each in found["levels"].values())}


def _first_token(run: Measured, prompt: list[int]) -> tuple[float, int]:
    """Seconds until a request that is alone has its first token, and how many tokens of its prompt were found."""
    name = run.add(prompt, 1)
    begun = time.perf_counter()
    (out,) = [out for out in _until_idle(run) if out.request_id == name]
    return time.perf_counter() - begun, out.cached_tokens


def _until_idle(run: Measured) -> list[StepOutput]:
    outputs = []
    while run.engine.has_work:
        outputs += run.engine.step()
    return outputs


def against_level_0(decoder: PackedDecoder, tokens: int, rounds: int) -> dict[str, Any]:
    """Decode of eight requests and prefill of one, level against level 0."""
    decodes: dict[int, list[float]] = {level: [] for level in LEVELS}
    prefills: dict[int, list[float]] = {level: [] for level in LEVELS}
    rooms = {level: Room(decoder, level, BATCH, tokens + STEPS) for level in LEVELS}
    for _ in range(rounds):
        for level, room in rooms.items():
            prefills[level].append(room.prefill([tokens])[0])
            decodes[level].append(statistics.median(room.decode(tokens)[WARM_UP:]))
    return {
        "batch": BATCH,
        "decode_seconds": decodes,
        "prefill_seconds": prefills,
        "decode_ratio": _ratio(decodes),
        "prefill_ratio": _ratio(prefills),
    }


def _ratio(seconds: dict[int, list[float]]) -> float:
    """How many times as fast the higher level is: the median over rounds of the two levels timed in one round."""
    low, high = (seconds[level] for level in LEVELS)
    return statistics.median(slow / fast for slow, fast in zip(low, high, strict=True))


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=None, help="bf16 or int4; default: the model's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=7936)
    parser.add_argument("--quick", action="store_true", help="prompts of 1,024 tokens, two rounds")
    parser.add_argument("--out", type=Path, default=engine_results() / "engine.json")
    arguments = parser.parse_args()
    tokens, rounds = (1024, 2) if arguments.quick else (arguments.tokens, arguments.rounds)
    service = build_engine(
        EngineSettings(weights=arguments.weights, threads=arguments.threads, memory_bytes=SMALL, adaptive=False)
    )
    decoder = service.engine.decoder
    assert service.adapter is not None
    result: dict[str, Any] = {
        "origin": origin(),
        "model": service.model_name,
        "adapter_sha256": digest(service.adapter.path),
        "weights": arguments.weights or str(decoder.dtype).removeprefix("torch."),
        "tokens": tokens,
        "levels": list(LEVELS),
        "read_bandwidth": [read_bandwidth()],
    }
    for name, part in (
        ("conversion", conversion),
        ("against_level_0", against_level_0),
        ("second_turn", second_turn),
        ("equal_bytes", equal_bytes),
    ):
        begun = time.perf_counter()
        result[name] = part(decoder, tokens, rounds)
        result["read_bandwidth"].append(read_bandwidth())
        ratios = {k: round(v, 3) for k, v in result[name].items() if k.endswith(("ratio", "share"))}
        print(f"{name}: {ratios} in {time.perf_counter() - begun:.0f} s", flush=True)  # noqa: T201
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
