"""The same work on this engine, transformers and llama.cpp, interleaved round by round on one machine.

    pip install -e '.[all]' && python -m venv llama && llama/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/peers/run.py --llama llama/bin/python --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Every engine stays loaded in a process of its own (`worker.py`); a round gives each work to each engine in turn, one process
computing at a time; short work has several turns in a round. Results go to `peers.json` in the folder of this kind of processor
in `benchmarks/results/` after every round, so a run may be stopped; ratios are medians over turns. Between rounds the read
bandwidth of memory is measured on the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from record import engine_results, origin

WORKER = Path(__file__).parent / "worker.py"
PREFILLS = (2048, 7936)
DECODES = ((1, 512), (1, 7936), (8, 7936))
STEPS = 8
TURNS = {"decode 1 x 512": 10}
"""Work that is done this often in each round, in turn: it is over before the machine is the same for all engines."""
LEVELS = (0, 23, 30)


class Process:
    """A worker that waits for tasks."""

    def __init__(self, python: str, setting: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.ask(setting)

    def ask(self, task: dict[str, Any]) -> Any:
        """Its answer to a task.

        Raises:
            RuntimeError: it died; what it said is on stderr.
        """
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(task) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker died at {task}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def bandwidth() -> float:
    """Bytes a second that summing an array of 400 MB reads."""
    array = torch.ones(100_000_000)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - begun)
    return 4e8 / best


def settings(arguments: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> interpreter and setting of every engine."""
    common = {"model": arguments.model, "threads": arguments.threads}
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for weights in ("bf16", "int4"):
        for level in LEVELS:
            name = f"dsla, level {level}, {weights}"
            found[name] = (sys.executable, {"engine": "dsla", "level": level, "weights": weights, **common})
    for cache in ("dynamic", "static"):
        found[f"transformers, {cache} cache, bf16"] = (
            sys.executable, {"engine": "transformers", "cache": cache, **common},
        )  # fmt: skip
    found["transformers, continuous batching, bf16"] = (sys.executable, {"engine": "continuous batching", **common})
    if arguments.llama:
        for attention in ("plain", "flash"):
            setting = {
                "engine": "llama.cpp",
                "attention": attention,
                "gguf": arguments.gguf,
                "threads": arguments.threads,
            }
            found[f"llama.cpp, Q4_1, {attention} attention"] = (arguments.llama, setting)
    return found


def works(name: str) -> list[dict[str, Any]]:
    """The tasks of an engine.

    transformers reads prompts the same way whatever its cache; its continuous batching is not given eight long prompts, which
    it did not get through in 27 minutes on two cores; llama.cpp has one request. Of level 0, attention is timed by itself.
    """
    tasks: list[dict[str, Any]] = []
    single = "llama" in name or "continuous" in name
    if "static" not in name:
        tasks += [{"prefill": tokens} for tokens in PREFILLS]
    tasks += [{"decode": list(decode), "steps": STEPS} for decode in DECODES if decode[0] == 1 or not single]
    if "level 0, bf16" in name:
        tasks.append({"attention": list(DECODES[-1]), "steps": STEPS})
    return tasks


def label(task: dict[str, Any]) -> str:
    """What a task is called in the results."""
    if "prefill" in task:
        return f"prefill {task['prefill']}"
    kind = "decode" if "decode" in task else "attention"
    return "{} {} x {}".format(kind, *task[kind])


def main() -> None:
    """Runs all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--llama", default=None, help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="engines whose name holds this")
    parser.add_argument("--without", default=None, help="leave out engines whose name holds this")
    parser.add_argument("--out", type=Path, default=engine_results() / "peers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {name: s for name, s in settings(arguments).items() if arguments.only in name}
    if arguments.without:
        chosen = {name: setting for name, setting in chosen.items() if arguments.without not in name}
    processes = {name: Process(*setting) for name, setting in chosen.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    reads: list[float] = []
    for done in range(arguments.rounds):
        reads.append(bandwidth())
        for kind in [label(task) for task in works("dsla, level 0, bf16")]:
            able = {name: task for name in processes for task in works(name) if label(task) == kind}
            for name, task in [*able.items()] * TURNS.get(kind, 1):
                took = processes[name].ask(task)
                # The first steps of a decode also build what later ones reuse.
                seconds[name].setdefault(kind, []).append(statistics.median(took[len(took) // 4 :]))
                print(f"round {done + 1}: {name}: {kind}: {seconds[name][kind][-1]:.4f} s", flush=True)  # noqa: T201
        result = {
            "origin": origin(),
            "rounds": done + 1,
            "read_bandwidth": reads,
            "seconds": seconds,
            "medians": {name: {k: statistics.median(v) for k, v in by.items()} for name, by in seconds.items()},
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for process in processes.values():
        process.close()


if __name__ == "__main__":
    main()
