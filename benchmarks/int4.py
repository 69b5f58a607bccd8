"""What four bits cost: perplexity of the default model with weights of bf16 and int4, as each kind of kernel multiplies them.

    python benchmarks/int4.py --wikitext wikitext2_test.txt.gz

Prompts of many rows are multiplied in tile registers where there is AMX, decodes and everything else by vectors; so each is
measured on the same prompts, in a process of its own (`DSLA_KERNELS`). Results go to `int4.json` in the folder of this kind of
processor in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import engine_results, origin

from dsla.convert.load import find_adapter, find_model
from dsla.distill.data import read_documents
from dsla.engine.batch import PackedBatch, Segment
from dsla.engine.decoder import PackedDecoder
from dsla.engine.memory import RequestMemory
from dsla.ops.cpu import kernels
from dsla.storage import write_json

LEVELS = (0, 15)
WINDOWS, LENGTH = 16, 1024


@torch.inference_mode()
def perplexities(wikitext: Path) -> dict[str, dict[str, float]]:
    """Perplexity by weights and level."""
    from transformers import AutoTokenizer

    path, config = find_model(None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n\n".join(read_documents([wikitext], tokenizer))
    tokens = tokenizer(text, add_special_tokens=False).input_ids[: WINDOWS * LENGTH]
    adapter = find_adapter(path, config, None, torch.bfloat16)
    found: dict[str, dict[str, float]] = {}
    for weights in ("bf16", "int4"):
        decoder = PackedDecoder.load(path, adapter, torch.bfloat16, int4=weights == "int4")
        for level in LEVELS:
            loss = sum(_loss(decoder, level, tokens[i : i + LENGTH]) for i in range(0, len(tokens), LENGTH))
            found.setdefault(weights, {})[f"level {level}"] = math.exp(loss / (WINDOWS * (LENGTH - 1)))
    return found


def _loss(decoder: PackedDecoder, level: int, tokens: list[int]) -> float:
    arena = decoder.arena(256 << 20)
    memory = RequestMemory(arena, decoder.n_layers, decoder.order[:level])
    memory.reserve(len(tokens))
    batch = PackedBatch([Segment(memory, tokens, 0, True)])
    batch.sample_rows = torch.arange(len(tokens) - 1)
    logits = decoder.forward(batch, arena).float()
    return float(F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))


def main() -> None:
    """Measures every kind of kernel there is here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2, one text file")
    parser.add_argument("--out", type=Path, default=engine_results() / "int4.json")
    parser.add_argument("--print", action="store_true", help="measure with the kernels of this process, and print")
    arguments = parser.parse_args()
    native = kernels()
    assert native is not None, "no kernels: what would be measured is PyTorch"
    if arguments.print:
        print(json.dumps({"int8 of an input": native.int8_parts, "perplexity": perplexities(arguments.wikitext)}))  # noqa: T201
        return
    kinds: dict[str, Any] = {}
    for kind in ("tiles", "vectors") if native.tiles else ("vectors",):
        command = [sys.executable, __file__, "--wikitext", str(arguments.wikitext), "--print"]
        environment = os.environ | ({"DSLA_KERNELS": "vectors"} if kind == "vectors" else {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        kinds[kind] = json.loads(done.stdout.splitlines()[-1])
    text = f"WikiText-2 ({arguments.wikitext.name}), {WINDOWS} windows of {LENGTH} tokens"
    write_json(arguments.out, {"origin": origin(), "text": text, "kernels": kinds})


if __name__ == "__main__":
    main()
