"""The rows of the recipe search, as data: what each changes of the base, and the question it answers.

A row's `mixer` overrides `BASE`, `lab` names what exists for the search alone (`recipe_lab.Lab`),
`train` overrides `TRAIN`; the order is that of running. `model` marks the rows that are also measured inside the model.
"""

from __future__ import annotations

from typing import Any

QUESTIONS = {
    "base": "The base, and how much the seed moves it",
    "shift": "Where the training windows lie: the same at the positions 0 ... 2,047",
    "states": "How many states, behind which window",
    "window": "Window and sinks",
    "fed": "What feeds the states, and how the parts are joined",
    "map": "Feature map and its width",
    "gates": "Gates",
    "delta": "Low-rank deltas on the q and o projections",
    "loss": "What the layer is trained for",
    "reference": "References: the paper's layer, and layers that train q, k, v and o in full (no KV cache folds into those)",
    "effort": "More steps, other learning rates",
}

BASE: dict[str, Any] = {
    "n_states": 2,
    "feature_map": "hedgehog",
    "normalizer": "shared",
    "gate_source": "key",
    "gate_shape": "scalar",
    "window": 64,
    "sinks": 4,
    "mixing": "query",
    "delta_rank": 32,
}
"""The mixer of `recipes/smollm2-135m.yaml` when the search was made; kept here, so that rows mean what they meant."""

TRAIN: dict[str, Any] = {
    "lr": 0.01,
    "contrast": 0.01,
    "loss": "attention",
    "seed": 0,
    "epochs": 1,
    "shifted": True,
}


def _row(name: str, question: str, model: bool = False, **changes: Any) -> dict[str, Any]:
    row = {"name": name, "question": question, "model": model, "mixer": {}, "lab": {}, "train": {}}
    for key, value in changes.items():
        part, _, setting = key.partition("__")
        row[part][setting] = value
    return row


_PAPER = {
    "mixer__feature_map": "identity",
    "mixer__normalizer": "none",
    "mixer__gate_source": "hidden",
    "mixer__gate_shape": "vector",
    "mixer__window": 0,
    "mixer__sinks": 0,
    "mixer__mixing": "layer",
    "mixer__delta_rank": 0,
    "mixer__rope": False,
}

ROWS: list[dict[str, Any]] = [
    _row("base", "base", True),
    _row("unshifted", "shift", True, train__shifted=False),
    _row("unshifted, 1 state", "shift", mixer__n_states=1, train__shifted=False),
    _row("unshifted, 1 state, no window", "shift", mixer__n_states=1, mixer__window=0, train__shifted=False),
    _row("unshifted, 2 states, no window", "shift", mixer__window=0, train__shifted=False),
    _row("unshifted, 1 state, half-life 512", "shift", mixer__n_states=1, lab__half_life=512.0, train__shifted=False),
    _row("unshifted, seed 1", "shift", train__seed=1, train__shifted=False),
    _row("unshifted, fed by all tokens", "shift", lab__fed="all", train__shifted=False),
    _row("unshifted, gated mixing", "shift", True, mixer__normalizer="state", train__shifted=False),
    _row("unshifted, one weight a head", "shift", mixer__mixing="head", train__shifted=False),
    _row("unshifted, 1 state, seed 1", "shift", mixer__n_states=1, train__seed=1, train__shifted=False),
    _row("1 state", "states", True, mixer__n_states=1),
    _row("1 state, no window", "states", mixer__n_states=1, mixer__window=0),
    _row("2 states, no window", "states", mixer__window=0),
    _row("base, seed 1", "base", True, train__seed=1),
    _row("1 state, seed 1", "states", mixer__n_states=1, train__seed=1),
    _row("gated mixing", "fed", True, mixer__normalizer="state"),
    _row("no deltas", "delta", True, mixer__delta_rank=0),
    _row("hedgehog, width D", "map", True, mixer__feature_dim=64),
    _row("constant gates", "gates", lab__frozen=("gates.weight",)),
    _row("hidden gates", "gates", mixer__gate_source="hidden"),
    _row("window 16", "window", mixer__window=16),
    _row("window 128", "window", mixer__window=128),
    _row("no sinks", "window", mixer__sinks=0),
    _row("mixer's output", "loss", True, train__loss="mixer"),
    _row("hidden states after the layer", "loss", True, train__loss="hidden"),
    _row("each token's relative error", "loss", True, train__loss="token"),
    _row("full q, k, v, o", "reference", True, mixer__delta_rank=0, lab__projections=True),
    _row("rank 16", "delta", mixer__delta_rank=16),
    _row("4 states", "states", mixer__n_states=4),
    _row("paper, lr 0.01", "reference", **_PAPER),
    _row("value gates", "gates", lab__gate_input="value"),
    _row("one weight a head", "fed", mixer__mixing="head"),
    _row("rank 64", "delta", mixer__delta_rank=64),
    _row("softmax, width D", "map", mixer__feature_map="softmax"),
    _row("paper", "reference", **_PAPER, train__lr=1e-4, train__contrast=0.1),
    _row("vector gates", "gates", mixer__gate_shape="vector"),
    _row("4 states, no window", "states", mixer__n_states=4, mixer__window=0),
    _row("elu, width D", "map", mixer__feature_map="elu"),
    _row("base, seed 2", "base", train__seed=2),
    _row("1 state, seed 2", "states", mixer__n_states=1, train__seed=2),
    _row("no decay", "gates", lab__frozen=("gates.weight", "gates.bias"), lab__half_life=1e9),
    _row("4 passes over the text", "effort", train__epochs=4),
    _row("1 state, 4 passes over the text", "effort", mixer__n_states=1, train__epochs=4),
    _row("1 state, window 16", "states", mixer__n_states=1, mixer__window=16),
    _row("gated mixing, fed by all tokens", "fed", mixer__normalizer="state", lab__fed="all"),
    _row("window 32", "window", mixer__window=32),
    _row("exp, width 2D", "map", lab__exp=True),
    _row("no window, no sinks", "window", mixer__window=0, mixer__sinks=0),
    _row("rank 8", "delta", mixer__delta_rank=8),
    _row("8 states", "states", mixer__n_states=8),
    _row("hedgehog, width 4D", "map", mixer__feature_dim=256),
    _row("lr 0.003", "effort", train__lr=0.003),
    _row("lr 0.03", "effort", train__lr=0.03),
    _row("8 states, no window", "states", mixer__n_states=8, mixer__window=0),
    _row("full q, k, v, o, no window", "reference", mixer__delta_rank=0, mixer__window=0, lab__projections=True),
    _row("hedgehog, small start", "map", lab__map_scale=64**-0.25),
    _row("vector gates, no window", "gates", mixer__gate_shape="vector", mixer__window=0),
]  # fmt: skip


def cost_lab(row: dict[str, Any]) -> dict[str, Any]:
    """The variants of a row that its speed depends on."""
    return {name: value for name, value in row["lab"].items() if name in ("gate_input", "fed", "exp")}


def cost_key(row: dict[str, Any]) -> str:
    """What a row's speed depends on; rows of one key are timed once."""
    changes = sorted((row["mixer"] | cost_lab(row)).items())
    return ", ".join(f"{name}={value}" for name, value in changes) or "base"
