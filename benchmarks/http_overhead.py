"""Throughput through HTTP over that of the engine driven directly, with the same work on the same machine.

    pip install -e '.[all]' && python benchmarks/http_overhead.py

A round gives the same number of requests at once to the engine in this process, stepped until all have ended, and to
`dsla serve` in another one, which streams each answer over a connection of its own; then the next round, in the other
order. Both have the default model at level 0, the same threads, and keep nothing for later requests. The client reads what
has come every `POLL` seconds, so that its own work, on the same cores, is as small as it can be; `client_share` says how small.
The result goes to `http.json` in the folder of this kind of processor in `benchmarks/results/`.
`--quick` takes few short requests, to see that all works.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from record import engine_results, origin
from serving import served

from dsla.engine import Engine, SamplingParams
from dsla.server.build import EngineSettings, build_engine
from dsla.storage import write_json

MEMORY = 1 << 30
POLL = 0.02
END = b"0\r\n\r\n"

Prompts = list[list[int]]


def directly(engine: Engine, prompts: Prompts, tokens: int) -> float:
    """Seconds the engine takes for all requests."""
    begun = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(tokens, temperature=0.0, ignore_eos=True))
    written = 0
    while engine.has_work:
        written += sum(len(output.tokens) for output in engine.step())
    seconds = time.perf_counter() - begun
    if written != len(prompts) * tokens:
        raise RuntimeError(f"the engine wrote {written} tokens, not {len(prompts)} times {tokens}")
    return seconds


def over_http(address: str, model: str, prompts: Prompts, tokens: int) -> tuple[float, float]:
    """Seconds a server takes for all requests, each on a connection of its own, and seconds this client computes meanwhile."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    host, port = urlsplit(address).hostname, urlsplit(address).port
    requests = []
    for prompt in prompts:
        content = json.dumps(body | {"prompt": prompt}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n"
        requests.append(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    begun, computed = time.perf_counter(), time.process_time()
    connections = [socket.create_connection((host, port)) for _ in requests]
    answers = [bytearray() for _ in requests]
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)
        connection.setblocking(False)
    reading = set(range(len(requests)))
    while reading:
        time.sleep(POLL)
        for place in sorted(reading):
            if _read(connections[place], answers[place]):
                reading.remove(place)
    times = time.perf_counter() - begun, time.process_time() - computed
    for connection, answer in zip(connections, answers, strict=True):
        connection.close()
        if _written(answer) != tokens:
            raise RuntimeError(f"an answer has {_written(answer)} tokens, not {tokens}: {bytes(answer[-300:])!r}")
    return times


def _read(connection: socket.socket, answer: bytearray) -> bool:
    """Takes what has come; whether that is all of the answer."""
    try:
        while part := connection.recv(1 << 20):
            answer += part
    except BlockingIOError:
        return answer.endswith(END)
    return True


def _written(answer: bytearray) -> int:
    """Tokens that a stream says it has written."""
    found = [line for line in answer.split(b"\n") if line.startswith(b"data: {") and b'"usage":{' in line]
    return int(json.loads(found[-1].removeprefix(b"data: "))["usage"]["completion_tokens"]) if found else 0


def main() -> None:
    """Runs all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=engine_results() / "http.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests, arguments.prompt_tokens, arguments.output_tokens, arguments.rounds = 8, 64, 32, 2
    service = build_engine(EngineSettings(memory_bytes=MEMORY, level=0, cache_bytes=0))
    engine, tokens, count = service.engine, arguments.output_tokens, arguments.requests
    generator, vocabulary = random.Random(0), engine.decoder.vocab_size
    threads = torch.get_num_threads()
    options = ("--memory", str(MEMORY), "--level", "0", "--cache", "0", "--threads", str(threads))
    rounds: list[dict[str, Any]] = []
    with served(*options, "--log-level", "warning") as address:
        for number in range(-1, arguments.rounds):
            prompts = [[generator.randrange(vocabulary) for _ in range(arguments.prompt_tokens)] for _ in range(count)]
            row: dict[str, Any] = {}
            for side in ("direct", "http")[:: 1 if number % 2 else -1]:
                if side == "direct":
                    row["direct_seconds"] = directly(engine, prompts, tokens)
                else:
                    row["http_seconds"], client = over_http(address, service.model_name, prompts, tokens)
                    row["client_share"] = client / row["http_seconds"]
            row["ratio"] = row["direct_seconds"] / row["http_seconds"]
            print("warm-up" if number < 0 else f"round {number + 1}", row, flush=True)  # noqa: T201
            if number >= 0:  # the first one warms both up
                rounds.append(row)
    median = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    data = {
        "origin": origin(),
        "requests": count,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": tokens,
        "threads": threads,
        "direct_tokens_per_second": count * tokens / median["direct_seconds"],
        "http_tokens_per_second": count * tokens / median["http_seconds"],
        "client_share": median["client_share"],
        "ratio": median["ratio"],
        "rounds": rounds,
    }
    write_json(arguments.out, data)
    print(f"{median['ratio']:.3f} of the engine's throughput arrives; {arguments.out}")  # noqa: T201


if __name__ == "__main__":
    main()
