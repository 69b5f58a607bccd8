"""Goodput of an adaptive server against one that stays at level 0: the same traces, in turn, at rising rates.

    pip install -e '.[all]' && python benchmarks/serving.py --traces mooncake_conversation.jsonl.zst azure2023_conv.jsonl.gz

Two servers (`dsla serve`) with the same memory stay up; one computes at a time. Of each trace, first, with a server at
level 0: the latencies of requests sent one by one, of which the objectives are a multiple (`SLO_SCALE`), and its capacity:
requests a second when all come at once. Then a replay at each multiple of that capacity. A machine may be slow for minutes, so
the trace is cut into parts (`--turns`), and each part is replayed against both servers, now the one first, now the other.
Results go to `serving.json` in the folder of this kind of processor in `benchmarks/results/` after every replay; other traces
that were replayed with the same settings before stay in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import engine_results, origin

from dsla.bench.goodput import Objectives, Outcome, span, summary
from dsla.bench.replay import Server, find_server, replay
from dsla.bench.trace import TraceRequest, Workload, fit, read_trace
from dsla.storage import write_json

SLO_SCALE = 5.0
"""Objectives: so many times the mean latencies of requests sent one by one."""
PROBES = 6
CAPACITY = 24
VOCABULARY = 32_000
TIMEOUT = 900.0
CALM = 12.0
"""Seconds between replays: levels of new requests fall back to 0 meanwhile."""


@contextlib.contextmanager
def served(*options: str) -> Iterator[str]:
    """The URL of a server with these options, which is stopped in the end."""
    command = [str(Path(sys.executable).with_name("dsla")), "serve", "--port", "0", *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://\S+?(?=/v1)", line):
                yield found[0]
                return
        raise RuntimeError(f"the server did not start: {' '.join(command)}")
    finally:
        process.terminate()
        process.wait()


async def replayed(server: Server, requests: tuple[TraceRequest, ...], seed: int) -> list[Outcome]:
    """What became of requests."""
    outcomes: list[Outcome] = []
    await replay(server, requests, [seed], VOCABULARY, TIMEOUT, outcomes, lambda still_open: None)
    return outcomes


async def alone(server: Server, workload: Workload) -> dict[str, Any]:
    """Latencies of the first requests of a trace, each sent when the one before has been answered."""
    outcomes = [
        (await replayed(server, (replace(request, at=0.0, hash_ids=()),), 10_000 + place))[0]
        for place, request in enumerate(workload.requests[:PROBES])
    ]
    return summary(outcomes, Objectives())


async def baseline(server: Server, workload: Workload) -> dict[str, Any]:
    """Latencies of requests sent one by one, the objectives that follow, and requests a second when all come at once."""
    await replayed(server, workload.requests[:1], 1)
    latencies = await alone(server, workload)
    burst = tuple(replace(request, at=0.0) for request in workload.requests[:CAPACITY])
    return {
        "alone": latencies,
        "objectives": {name: SLO_SCALE * latencies[name]["mean"] for name in ("ttft", "tpot")},
        "capacity": summary(await replayed(server, burst, 2), Objectives())["requests_per_second"],
        "requests": len(workload.requests),
        "dropped": workload.dropped,
        "mean_prompt_tokens": sum(r.prompt_tokens for r in workload.requests) / len(workload.requests),
        "mean_output_tokens": sum(r.output_tokens for r in workload.requests) / len(workload.requests),
    }


async def compared(
    servers: dict[str, Server], parts: list[tuple[TraceRequest, ...]], rate: float, goal: Objectives, seed: int
) -> Any:
    """The same requests at a mean rate to each server, part by part in turn."""
    outcomes: dict[str, list[Outcome]] = {setting: [] for setting in servers}
    seconds = dict.fromkeys(servers, 0.0)
    for turn, part in enumerate(parts):
        for setting in sorted(servers, reverse=turn % 2 == 0):
            time.sleep(CALM)
            found = await replayed(servers[setting], part, seed * len(parts) + turn)
            outcomes[setting] += found
            seconds[setting] += span(found)
    row = {setting: summary(outcomes[setting], goal, seconds[setting]) for setting in servers}
    adaptive, level_0 = row["adaptive"]["goodput"], row["level 0"]["goodput"]
    return {"rate": rate, **row, "goodput_ratio": 1.0 if adaptive == level_0 else adaptive / max(level_0, 1e-9)}


def cut(requests: tuple[TraceRequest, ...], turns: int) -> list[tuple[TraceRequest, ...]]:
    """Requests in parts of the same length, each beginning at 0."""
    size = -(-len(requests) // turns)
    parts = [requests[first : first + size] for first in range(0, len(requests), size)]
    return [tuple(replace(request, at=request.at - part[0].at) for request in part) for part in parts]


async def run(arguments: argparse.Namespace) -> None:
    """All traces."""
    common = ["--memory", arguments.memory, "--threads", str(arguments.threads)]
    # Whoever waits is given up by the client alone, after `TIMEOUT`.
    common += ["--request-timeout", "0", "--log-level", "warning"]
    limits = (None, None, arguments.max_tokens)
    settings = {
        "memory": arguments.memory,
        "threads": arguments.threads,
        "length_scale": arguments.scale,
        "slo_scale": SLO_SCALE,
    }
    data: dict[str, Any] = {"origin": origin(), **settings, "traces": {}}
    if arguments.out.is_file():
        known = json.loads(arguments.out.read_text(encoding="utf-8"))
        if all(known[name] == value for name, value in settings.items()):
            data["traces"] = known["traces"]
    for path in arguments.traces:
        workload = fit(read_trace(path), arguments.requests, arguments.scale, *limits)
        with served(*common, "--level", "0") as base:
            result = await baseline(await find_server(base, VOCABULARY), workload)
        result |= {"turns": arguments.turns, "origin": origin(), "rates": {}}
        data["traces"][path.name.partition(".")[0]] = result
        goal = Objectives(**result["objectives"])
        print(f"{path.name}: capacity {result['capacity']:.3f}/s, {goal}", flush=True)  # noqa: T201
        # Both know the objectives: they bound the time of a step at any level.
        bounded = [*common, "--slo-ttft", f"{goal.ttft:.3f}", "--slo-tpot", f"{goal.tpot:.3f}"]
        with served(*bounded, "--level", "0") as base, served(*bounded) as url:
            servers = {name: await find_server(one, VOCABULARY) for name, one in (("level 0", base), ("adaptive", url))}
            for server in servers.values():
                await replayed(server, workload.requests[:1], 1)
            for seed, multiple in enumerate(arguments.rates, 3):
                rate = multiple * result["capacity"]
                row = await compared(servers, cut(workload.at_rate(rate).requests, arguments.turns), rate, goal, seed)
                result["rates"][f"{multiple:g}"] = row
                shown = {s: (row[s]["met"], round(row[s]["goodput"], 4), row[s]["mean_level"]) for s in servers}
                print(f"  {multiple:g}x: {shown}, ratio {row['goodput_ratio']:.2f}", flush=True)  # noqa: T201
                write_json(arguments.out, data)


def main() -> None:
    """Runs all traces at all rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, nargs="+", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="times level 0's capacity")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--turns", type=int, default=4, help="parts of a trace")
    parser.add_argument("--scale", type=float, default=0.25, help="factor for lengths")
    parser.add_argument(
        "--max-tokens", type=int, default=8192, help="requests longer than this are dropped and counted"
    )
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=engine_results() / "serving.json")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
