"""Speed of the two kinds of training steps: one layer of the chain, and all layers together in a stage.

With and without the allocator keeping freed memory, in turn, each round in a process of its own. Tokens are counted against
processor time, so that other programs on the machine count little.

python benchmarks/training.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import RESULTS, origin

from dsla.convert import Plan, Teacher
from dsla.convert.load import find_model, load_model
from dsla.convert.surgery import Levels
from dsla.distill import Recipe
from dsla.distill.allocator import keep_freed_memory
from dsla.distill.flops import Costs, mean_level
from dsla.distill.layer import LayerTask
from dsla.distill.nested import level_backward
from dsla.distill.objective import layer_loss
from dsla.distill.trunk import Trunk
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaMixer
from dsla.storage import write_json

TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each kind in a round")
    parser.add_argument("--child", choices=["kept", "given_back"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child == "kept", args.steps)))  # noqa: T201
        return
    rounds: dict[str, list[dict[str, float]]] = {"kept": [], "given_back": []}
    for _ in range(args.rounds):
        for freed, found in rounds.items():
            command = [sys.executable, __file__, "--child", freed, "--steps", str(args.steps)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(printed.splitlines()[-1]))
    summary = {
        freed: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for freed, found in rounds.items()
    }
    write_json(args.out, {**origin(), "tokens": TOKENS, "freed_memory": summary, "rounds": rounds})


def measure(keep: bool, steps: int) -> dict[str, float]:
    """Tokens and FLOPs a second of processor time, of a layer's step and of a stage's."""
    if keep:
        keep_freed_memory()
    path, config = find_model(None)
    model, recipe = load_model(path).requires_grad_(False), Recipe()
    trunk, costs, family = Trunk(model), Costs(model, recipe.mixer), family_of(config)
    layer = trunk.layers[len(trunk.layers) // 4]
    softmax = getattr(layer, family.attention)
    torch.manual_seed(0)
    mixers = {i: DslaMixer(recipe.mixer, attention_shape(config)) for i in range(len(trunk.layers))}
    plan = Plan(Teacher("", "", len(mixers)), tuple(mixers), recipe.mixer)
    levels, highest = Levels(model, plan, mixers), len(mixers)
    levels.set(highest)
    rows = torch.randint(0, config.vocab_size, (2, TOKENS))
    attention, norm = getattr(layer, family.attention), layer.get_submodule(family.attention_norm)
    task = LayerTask(0, attention, softmax, norm, [trunk.embed(rows)], [], trunk)

    def layer_step() -> None:
        x, target, position = task.question(task.inputs[0])
        layer_loss(attention, x, target, position, recipe.train.gate_contrast)[0].backward()

    def stage_step() -> None:
        level_backward(trunk, levels, rows[0::2], highest, 1.0)
        level_backward(trunk, levels, rows[1::2], highest // 2, 1.0)

    found = {}
    for name, step, flops in (
        ("layer", layer_step, costs.layer_step(TOKENS)),
        ("stage", stage_step, costs.stage_step(TOKENS, mean_level(highest))),
    ):
        rate = rows.numel() / _seconds(step, steps)
        found |= {f"{name}_tokens_per_second": rate, f"{name}_flop_per_second": rate * flops}
    return found


def _seconds(step: Callable[[], None], count: int) -> float:
    """Processor time of the quickest of some steps, after one to warm up."""
    step()
    taken = []
    for _ in range(count):
        begun = time.process_time()
        step()
        taken.append(time.process_time() - begun)
    return min(taken)


if __name__ == "__main__":
    main()
