"""Quality and bytes of the levels: perplexity with the adapter, and of two floors with the same window and sinks.

`floor` is training-free: no states and no deltas. `states_off` is the trained adapter with its states left out.

python benchmarks/levels.py --wikitext wikitext2_valid.txt.gz --books books_long.jsonl.zst
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, digest, origin

import dsla
from dsla.convert import find_adapter, read_config
from dsla.convert.adapter import cast
from dsla.convert.surgery import Levels
from dsla.distill.data import read_documents
from dsla.engine import PackedDecoder
from dsla.evals import perplexity
from dsla.families import attention_shape
from dsla.hub import resolve_model
from dsla.mixers import DslaMixer
from dsla.storage import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2 validation, one text file")
    parser.add_argument("--books", type=Path, help="books, one a line under 'text'")
    parser.add_argument("--levels", default="0,8,15,23,30")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS / "levels.json")
    args = parser.parse_args()

    model, tokenizer = dsla.load(adapter=args.adapter, dtype=getattr(torch, args.dtype))
    texts = {"wikitext2_1k": _windows(tokenizer, args.wikitext, 8, 1024)}
    if args.books:
        texts["books_4k"] = _windows(tokenizer, args.books, 2, 4096)
    floor = _floor(model)
    rows: list[dict[str, Any]] = []
    for level in (int(x) for x in args.levels.split(",") if int(x) <= len(model.dsla.mixers)):
        model.dsla.set(level)
        row: dict[str, Any] = {"level": level}
        for name, windows in texts.items():
            row[name] = perplexity(model, windows)
            if level:
                _states(model.dsla.mixers, off=True)
                row[f"{name}_states_off"] = perplexity(model, windows)
                _states(model.dsla.mixers, off=False)
                floor.set(level)
                row[f"{name}_floor"] = perplexity(model, windows)
                model.dsla.set(level)
        rows.append(row)
        print(row, flush=True)  # noqa: T201
        _write(args, rows)


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    path = resolve_model(None)
    config = read_config(path)
    adapter = find_adapter(path, config, args.adapter, torch.bfloat16)
    if adapter is None:
        raise SystemExit("no adapter for the default model")
    decoder = PackedDecoder.load(path, adapter, torch.bfloat16)
    arena = decoder.arena(1 << 28)
    fixed, token = arena.slot_units * arena.page_bytes, decoder.kv_spec.bytes_per_token
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    write_json(
        args.out,
        {
            "origin": origin(),
            "dtype": args.dtype,
            "texts": {
                "wikitext2_1k": "WikiText-2 validation, first 8 windows of 1,024 tokens",
                "books_4k": "2 windows of 4,096 tokens",
            },
            "teacher_bytes": weights,
            "adapter_memory_bytes": adapter.nbytes,
            "adapter_disk_bytes": sum(file.stat().st_size for file in adapter.path.glob("layer-*.safetensors")),
            "adapter_layers": adapter.max_level,
            "adapter_sha256": digest(adapter.path),
            "kv_bytes_per_token_and_layer": token,
            "dsla_bytes_per_layer": fixed,
            "break_even_tokens": fixed / token,
            "n_layers": config.num_hidden_layers,
            "rows": rows,
        },
    )


def _windows(tokenizer: Any, path: Path, count: int, length: int) -> torch.Tensor:
    """The first `count` windows: of the one text, or one of each of the first texts."""
    documents = iter(read_documents([path]))
    first = tokenizer(next(documents), add_special_tokens=False)["input_ids"]
    if path.name.startswith("wikitext"):
        return torch.tensor(first[: count * length]).view(count, length)
    rows = [first, *(tokenizer(next(documents), add_special_tokens=False)["input_ids"] for _ in range(count - 1))]
    # Past the front matter.
    return torch.tensor([row[length : 2 * length] for row in rows])


def _floor(model: Any) -> Levels:
    """The same levels with untrained mixers, whose deltas are zero, and without states."""
    plan, parameter = model.dsla.plan, next(model.parameters())
    shape = attention_shape(model.config)
    mixers = {layer: cast(DslaMixer(plan.mixer, shape), parameter.dtype).eval() for layer in model.dsla.mixers}
    _states(mixers, off=True)
    model.dsla.set(0)
    return Levels(model, plan, mixers)


def _states(mixers: dict[int, DslaMixer], off: bool) -> None:
    for mixer in mixers.values():
        mixer.states_off = mixer.all_states if off else frozenset()


if __name__ == "__main__":
    main()
