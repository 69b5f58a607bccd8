"""Orders of the layers, compared by the levels they give.

Every metric orders the layers by the same few windows of training text. Each order is then judged on held-out text, at
three levels and in two ways: `floor`, converted layers are window and sinks alone, and `trained`, they are the adapter's.
The figures are against the untouched model: ratio of perplexities, and KL divergence of the next-token distributions.

python benchmarks/orders.py --train train_text_01.jsonl.zst --train train_chat.jsonl.zst --valid valid.jsonl.zst
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, digest, origin
from torch import Tensor

import dsla
from dsla.convert import Plan
from dsla.convert.surgery import Levels
from dsla.distill.data import open_text, token_windows
from dsla.sensitivity import METRICS, Probe
from dsla.sensitivity.journal import Journal
from dsla.sensitivity.measured import floor_mixer
from dsla.storage import write_json

KINDS = ("books", "chat", "code", "docs")
_STRIDE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--train", type=Path, action="append", required=True, help="the orders are measured on it")
    parser.add_argument("--valid", type=Path, required=True, help="the levels are judged on it")
    parser.add_argument(
        "--order", action="append", default=[], metavar="NAME=PLAN", help="a further order, from a plan"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of the window of each kind that orders")
    parser.add_argument("--valid-len", type=int, default=1024, help="tokens of a window that judges")
    parser.add_argument("--books", type=int, default=2, help="windows of books that judge, and as many of other text")
    parser.add_argument("--levels", default="8,15,23")
    parser.add_argument("--random", type=int, default=3, help="random orders")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--progress", type=Path, default=Path("orders-progress"), help="measurements under way")
    parser.add_argument("--out", type=Path, default=RESULTS / "orders.json")
    args = parser.parse_args()

    made = origin()
    model, tokenizer = dsla.load(adapter=args.adapter)
    model.requires_grad_(False)
    args.progress.mkdir(exist_ok=True)
    tokens = torch.cat([_windows(tokenizer, args.train, (kind,), args.seq_len, 1, 0) for kind in KINDS])
    rest = tuple(kind for kind in KINDS if kind != "books")
    texts = {
        "books": _windows(tokenizer, [args.valid], ("books",), args.valid_len, args.books, 0),
        "other": torch.cat(
            [_windows(tokenizer, [args.valid], (rest[i % 3],), args.valid_len, 1, i) for i in range(args.books)]
        ),
    }
    judge = _Judge(model, tokens, texts)
    result = {
        "origin": made,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "adapter_sha256": digest(args.adapter or _shipped(model)),
        "measured_on": {
            "kinds": list(KINDS),
            "windows": len(tokens),
            "seq_len": args.seq_len,
            "candidates": args.candidates,
        },
        "judged_on": {"windows": {name: len(windows) for name, windows in texts.items()}, "seq_len": args.valid_len},
        "n_layers": model.config.num_hidden_layers,
        "levels": [int(level) for level in args.levels.split(",")],
    }
    judged = args.progress / "judged.json"
    known = json.loads(judged.read_text(encoding="utf-8")) if judged.exists() else {}
    orders: list[dict[str, Any]] = []
    # What is quick comes first: what is known is written after every order.
    for entry in itertools.chain(map(_given, args.order), _measured(model, tokens, args)):
        for level in result["levels"]:
            key = " ".join(map(str, sorted(entry["order"][:level])))
            if key not in known:
                known[key] = judge(entry["order"], level)
                write_json(judged, known)
            entry.setdefault("at", {})[str(level)] = known[key]
        print(entry["name"], entry["at"], flush=True)  # noqa: T201
        orders.append(entry)
        write_json(args.out, result | {"orders": orders})


def _measured(model: Any, tokens: Tensor, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every metric's order, where layers are converted also with the adapter's mixers; found again if measured before."""
    measures = [(name, False) for name, metric in METRICS.items() if not metric.converts]
    measures += [(name, trained) for trained in (False, True) for name, metric in METRICS.items() if metric.converts]
    for name, trained in measures:
        full = name + ("_trained" if trained else "")
        journal = Journal(args.progress / f"{'trained' if trained else 'floor'}.journal.json")
        for seed in range(args.random if name == "random" else 1):
            entry = {"name": f"{full}_{seed}" if name == "random" else full, "metric": name, "trained": trained}
            path = args.progress / f"{entry['name']}.json"
            if not path.exists():
                mixers, trials = model.dsla.mixers if trained else None, []
                probe = Probe(model, tokens, model.dsla.plan.mixer, mixers, seed, args.candidates, journal)
                ranking = METRICS[name].rank(probe, lambda done, total, of=full, to=trials: _show(of, done, total, to))
                entry |= dataclasses.asdict(ranking) | {"trials": len(trials) if METRICS[name].converts else 0}
                write_json(path, entry)
            yield json.loads(path.read_text(encoding="utf-8"))


def _show(name: str, done: int, total: int, trials: list[int]) -> None:
    trials.append(done)
    print(name, done, total, flush=True)  # noqa: T201


def _given(option: str) -> dict[str, Any]:
    name, _, path = option.partition("=")
    plan = Plan.load(Path(path))
    return {"name": name, "metric": plan.metric, "trained": False, "order": list(plan.order), "trials": None}


class _Judge:
    """Perplexity ratio and KL of a level of any order, floor and trained, for each text."""

    @torch.no_grad()
    def __init__(self, model: Any, tokens: Tensor, texts: dict[str, Tensor]) -> None:
        self._model, self._texts, self._trained = model, texts, model.dsla
        mixer = floor_mixer(Probe(model, tokens, model.dsla.plan.mixer))
        self._floor = Levels(model, model.dsla.plan, dict.fromkeys(model.dsla.mixers, mixer))
        self._teacher = {name: [self._log_probs(window) for window in windows] for name, windows in texts.items()}

    @torch.no_grad()
    def __call__(self, order: Iterable[int], level: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for way, levels in (("floor", self._floor), ("trained", self._trained)):
            levels.plan = dataclasses.replace(levels.plan, order=tuple(order))
            levels.set(level)
            found[way] = {name: self._compare(name) for name in self._texts}
            levels.set(0)
        return found

    def _compare(self, name: str) -> dict[str, Any]:
        ratios, kls = [], []
        for window, teacher in zip(self._texts[name], self._teacher[name], strict=True):
            ours = self._log_probs(window)
            following = window[1::_STRIDE].unsqueeze(-1)
            ratios.append(float((teacher - ours).gather(-1, following).mean()))
            kls.append(float((teacher.exp() * (teacher - ours)).sum(-1).mean()))
        return {"ratio": math.exp(sum(ratios) / len(ratios)), "kl": sum(kls) / len(kls), "kl_by_window": kls}

    def _log_probs(self, window: Tensor) -> Tensor:
        """Log-probabilities of what follows every fourth token, `[T / 4, vocab]`."""
        hidden = self._model.get_decoder()(window.unsqueeze(0), use_cache=False).last_hidden_state
        return self._model.get_output_embeddings()(hidden[0, :-1:_STRIDE]).float().log_softmax(-1)


def _windows(tokenizer: Any, paths: list[Path], kinds: tuple[str, ...], length: int, count: int, seed: int) -> Tensor:
    return token_windows(tokenizer, _documents(paths, kinds), length, count, seed)


def _documents(paths: list[Path], kinds: tuple[str, ...]) -> Iterator[str]:
    for path in paths:
        with open_text(path) as file:
            for line in file:
                record = json.loads(line)
                if record["source"].split("/")[0] in kinds:
                    yield record["text"]


def _shipped(model: Any) -> Path:
    return Path(dsla.__file__).parent / "adapters" / str(model.dsla.plan.teacher.name)


if __name__ == "__main__":
    main()
