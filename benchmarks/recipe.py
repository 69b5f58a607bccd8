"""The recipe search: single layers and short chains trained by variants of the recipe, row after row, resumable.

python benchmarks/recipe.py --train train_text_00.jsonl.zst --train train_chat.jsonl.zst --valid valid.jsonl.zst --cache DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from recipe_lab import FullLinear, Lab, LabMixer, Teacher, fit, layer_errors
from recipe_rows import BASE, ROWS, TRAIN, cost_key, cost_lab
from recipe_text import long_windows, text_windows
from record import RESULTS, origin
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsla
from dsla.convert.surgery import ConvertedAttention, project
from dsla.distill.data import read_documents
from dsla.distill.objective import teacher_output
from dsla.mixers import DslaConfig
from dsla.storage import write_json

LAYERS = (16, 3, 18)
"""An easy, a middling and the most sensitive layer, by the measured KL of the shipped plan."""
TOGETHER = (16, 18)
"""The layers converted together in the model: with the early one most of a pass would have to be computed for every row."""
CHAIN = (16, 17, 18, 19)
SEQ_LEN, LONG, PASSAGE = 2048, 8192, 1024
KL_STRIDE = 4
FITTED_TEXTS = ("train", "books", "copies")
MODEL_TEXTS: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "mixed": (2, {"2k": (0, SEQ_LEN)}),
    "copies": (1, {"copy": (PASSAGE, 2 * PASSAGE)}),
    "books": (1, {"8k": (0, LONG), "4k-8k": (LONG // 2, LONG)}),
}
"""Texts of the model part: how many windows, and the positions that count."""
ROUNDS = 3
BASE_COST = cost_key(ROWS[0])

Results = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, action="append", required=True, help="training text; may be repeated")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text with long documents")
    parser.add_argument("--cache", type=Path, required=True, help="folder for activations and fitted layers")
    parser.add_argument("--steps", type=int, default=24, help=f"windows of {SEQ_LEN} tokens a layer is trained on")
    parser.add_argument("--parts", default="fit,model,chain,time")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipe.json")
    args = parser.parse_args()

    model, tokenizer = dsla.load()
    teacher = Teacher(model, args.cache)
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    results |= {
        "origin": origin(),
        "layers": list(LAYERS),
        "chain_layers": list(CHAIN),
        "together": list(TOGETHER),
        "base": BASE,
    }
    results |= {"base": BASE, "train": TRAIN}
    results["tokens"] = args.steps * SEQ_LEN
    texts = _texts(tokenizer, args)
    parts: dict[str, Callable[..., None]] = {"fit": _fit, "model": _model, "chain": _chain, "time": _time}
    for part in args.parts.split(","):
        parts[part](teacher, texts, results, args)


def _texts(tokenizer: Any, args: argparse.Namespace) -> dict[str, Tensor]:
    """All token windows of the search, made once."""
    path = args.cache / "tokens.safetensors"
    if path.exists():
        return load_file(path)
    train, valid = list(read_documents(args.train)), list(read_documents([args.valid]))
    passages = text_windows(tokenizer, valid, PASSAGE, 4, 2)
    found = {
        "train": text_windows(tokenizer, train, SEQ_LEN, args.steps, 0),
        "books": long_windows(tokenizer, valid, LONG, 3),
        "mixed": text_windows(tokenizer, valid, SEQ_LEN, 2, 1),
        "copies": torch.cat([passages, passages], 1),
    }
    save_file(found, path)
    return found


def _mixer(teacher: Teacher, row: dict[str, Any], seed: int) -> LabMixer:
    torch.manual_seed(seed)
    return LabMixer(DslaConfig(**BASE | row["mixer"]), teacher.shape, Lab(**row["lab"]))


def _fit(teacher: Teacher, texts: dict[str, Tensor], results: Results, args: argparse.Namespace) -> None:
    """Each row's layers trained by themselves on the teacher's inputs, and their errors on held-out text."""
    data = {name: teacher.activations(name, texts[name], LAYERS) for name in FITTED_TEXTS}
    rows = results.setdefault("rows", {})
    for row in ROWS:
        if row["name"] in rows:
            continue
        train, errors, started = TRAIN | row["train"], {}, time.monotonic()
        for layer in LAYERS:
            mixer = _mixer(teacher, row, train["seed"])
            attention = fit(teacher, layer, mixer, data["train"], train)
            errors[str(layer)] = layer_errors(teacher, attention, data["books"], data["copies"])
            _keep(args.cache, row["name"], attention)
        spec, config = mixer.state_spec(torch.bfloat16), mixer.config
        rows[row["name"]] = {
            "question": row["question"],
            "mixer": row["mixer"],
            "lab": row["lab"],
            "train": row["train"],
            "errors": errors,
            "mean": {key: statistics.fmean(e[key] for e in errors.values()) for key in errors[str(LAYERS[0])]},
            "state_bytes": spec.fixed_bytes,
            "foldable": config.foldable and not mixer.lab.projections,
            "trained_parameters": sum(p.numel() for p in _trained(attention).values()),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(args.out, results)
        print(row["name"], rows[row["name"]]["mean"], rows[row["name"]]["seconds"], flush=True)  # noqa: T201


def _trained(attention: ConvertedAttention) -> dict[str, Tensor]:
    own = {f"mixer.{name}": p for name, p in attention.mixer.named_parameters()}
    full = {name: getattr(attention, name) for name in attention.names}
    return own | {f"{name}.weight": m.weight for name, m in full.items() if isinstance(m, FullLinear)}


def _fit_path(cache: Path, name: str, layer: int) -> Path:
    return cache / "fits" / f"{name.replace(' ', '_').replace(',', '').replace(chr(39), '')}.{layer}.safetensors"


def _keep(cache: Path, name: str, attention: ConvertedAttention) -> None:
    path = _fit_path(cache, name, attention.layer_idx)
    path.parent.mkdir(exist_ok=True)
    save_file({key: p.detach().contiguous() for key, p in _trained(attention).items()}, path)


def _restore(teacher: Teacher, cache: Path, row: dict[str, Any], layer: int) -> ConvertedAttention:
    attention = teacher.converted(layer, _mixer(teacher, row, 0))
    attention.load_state_dict(load_file(_fit_path(cache, row["name"], layer)), strict=False)
    return attention


def _model(teacher: Teacher, texts: dict[str, Tensor], results: Results, args: argparse.Namespace) -> None:
    """The model with two of the row's layers converted, against the teacher's next-token distributions."""
    found = results.setdefault("model", {})
    named = {row["name"]: row for row in ROWS if row["model"]}
    for name, row in named.items():
        if name in found or name not in results["rows"]:
            continue
        converted = {layer: _restore(teacher, args.cache, row, layer) for layer in TOGETHER}
        found[name] = _against_teacher(teacher, texts, converted)
        if name == "base":
            for attention in converted.values():
                attention.mixer.near_only = True
            found["base, states left out"] = _against_teacher(teacher, texts, converted)
        write_json(args.out, results)
        print("model", name, found[name], flush=True)  # noqa: T201


@torch.no_grad()
def _against_teacher(
    teacher: Teacher, texts: dict[str, Tensor], converted: dict[int, ConvertedAttention]
) -> dict[str, float]:
    """KL in nats from the teacher, and the perplexity's ratio, on every text of the model part."""
    first, last = LAYERS[0], len(teacher.layers)
    divergence: dict[str, list[float]] = {}
    surplus: dict[str, list[float]] = {}
    for text, (count, parts) in MODEL_TEXTS.items():
        inputs = teacher.activations(text, texts[text], LAYERS if text in FITTED_TEXTS else (first,))[f"in.{first}"][
            :count
        ]
        finals = teacher.finals(text, inputs, first)
        for hidden, final, tokens in zip(inputs.split(1), finals, texts[text], strict=False):
            for layer, attention in converted.items():
                setattr(teacher.layers[layer], teacher.family.attention, attention)
            try:
                own = teacher.run(hidden, first, last)[0]
            finally:
                for layer in converted:
                    setattr(teacher.layers[layer], teacher.family.attention, teacher.softmax[layer])
            position = torch.arange(0, len(tokens) - 1, KL_STRIDE)
            log_p, log_q = (teacher.head(teacher.norm(h[position])).float().log_softmax(-1) for h in (final, own))
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
            following = tokens[position + 1].unsqueeze(1)
            worse = (log_p.gather(1, following) - log_q.gather(1, following)).squeeze(1)
            for name, (start, end) in parts.items():
                inside = (position >= start) & (position < end)
                divergence.setdefault(name, []).append(float(kl[inside].mean()))
                surplus.setdefault(name, []).append(float(worse[inside].mean()))
    ratios = {f"{name}_ratio": float(torch.tensor(x).mean().exp()) for name, x in surplus.items()}
    return {f"{name}_kl": statistics.fmean(x) for name, x in divergence.items()} | ratios


def _chain_data(teacher: Teacher, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs and attention outputs of the chain's layers, from those nearest before them."""
    found = {}
    for layer in CHAIN:
        start = max(known for known in LAYERS if known <= layer)
        inputs = torch.cat([teacher.run(h, start, layer) for h in data[f"in.{start}"].split(1)])
        found[f"in.{layer}"], found[f"out.{layer}"] = inputs, _softmax_outputs(teacher, layer, inputs)
    return found


def _softmax_outputs(teacher: Teacher, layer: int, inputs: Tensor) -> Tensor:
    norm, position = teacher.attention_norm(layer), teacher.position(inputs.shape[1])
    return torch.cat([teacher_output(teacher.softmax[layer], norm(h), position) for h in inputs.split(1)])


def _chain(teacher: Teacher, texts: dict[str, Tensor], results: Results, args: argparse.Namespace) -> None:
    """Layers in a row, trained on the student's inputs or the teacher's, and measured together."""
    chains = results.setdefault("chain", {})
    base = ROWS[0]
    data = _chain_data(teacher, teacher.activations("train", texts["train"], LAYERS))
    for name in ("student inputs", "teacher inputs", "student inputs, teacher outputs"):
        if name in chains:
            continue
        converted: dict[int, ConvertedAttention] = {}
        hidden = data[f"in.{CHAIN[0]}"]
        for layer in CHAIN:
            inputs = data[f"in.{layer}"] if name == "teacher inputs" else hidden
            target = data[f"out.{layer}"]
            if name == "student inputs":
                target = _softmax_outputs(teacher, layer, inputs)
            attention = fit(
                teacher, layer, _mixer(teacher, base, 0), {f"in.{layer}": inputs, f"out.{layer}": target}, TRAIN
            )
            converted[layer] = attention
            setattr(teacher.layers[layer], teacher.family.attention, attention)
            if name != "teacher inputs" and layer != CHAIN[-1]:
                hidden = torch.cat([teacher.run(h, layer, layer + 1) for h in hidden.split(1)])
            setattr(teacher.layers[layer], teacher.family.attention, teacher.softmax[layer])
        chains[name] = _against_teacher(teacher, texts, converted)
        write_json(args.out, results)
        print("chain", name, chains[name], flush=True)  # noqa: T201


@torch.no_grad()
def _time(teacher: Teacher, texts: dict[str, Tensor], results: Results, args: argparse.Namespace) -> None:
    """Prefill of the whole layer and fold of its cache, all rows in turn, several rounds: medians, milliseconds of CPU time."""
    shape, layer = teacher.shape, LAYERS[0]
    rows = {cost_key(row): row | {"lab": cost_lab(row)} for row in ROWS if row["name"] in results["rows"]}
    attentions: dict[str, Any] = {"softmax": teacher.softmax[layer]}
    attentions |= {key: teacher.converted(layer, _mixer(teacher, row, 0)) for key, row in rows.items()}
    taken: dict[str, dict[str, list[float]]] = {key: {} for key in attentions}
    for _ in range(ROUNDS):
        for length, name in ((SEQ_LEN, "2k"), (LONG, "8k")):
            x = torch.randn(1, length, shape.hidden_size).bfloat16()
            k, v = torch.randn(2, length, shape.n_kv_heads, shape.head_dim).bfloat16()
            for key, attention in attentions.items():
                taken[key].setdefault(f"prefill_{name}", []).append(_milliseconds(_prefill, teacher, attention, x))
                if key != "softmax" and attention.mixer.config.foldable:
                    taken[key].setdefault(f"fold_{name}", []).append(_milliseconds(attention.mixer.fold, k, v))
        print("time", len(taken["softmax"]["prefill_8k"]), "of", ROUNDS, flush=True)  # noqa: T201
    medians = {key: {what: statistics.median(x) for what, x in t.items()} for key, t in taken.items()}
    ratios = {
        key: {
            what: statistics.median(a / b for a, b in zip(x, taken[BASE_COST][what], strict=True))
            for what, x in t.items()
        }
        for key, t in taken.items()
    }
    results["time"] = {"milliseconds": medians, "against_base": ratios, "rounds": ROUNDS}
    write_json(args.out, results)


def _prefill(teacher: Teacher, attention: Any, x: Tensor) -> None:
    position = teacher.position(x.shape[1])
    if isinstance(attention, ConvertedAttention) and attention.mixer.lab.fed == "all":
        attention.output(attention.mixer.heads(x, *project(attention, x, position))[0])
    else:
        attention(x, position, None)


def _milliseconds(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.thread_time()
    run(*arguments)
    return (time.thread_time() - start) * 1e3


if __name__ == "__main__":
    main()
