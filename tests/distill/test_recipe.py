"""Recipes: the committed ones load, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsla.distill import Recipe
from dsla.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_recipes_load(path: Path) -> None:
    Recipe.load(path)


def test_paper_recipe_is_the_published_layer() -> None:
    mixer = Recipe.load(RECIPES / "paper.yaml").mixer
    assert (mixer.feature_map, mixer.normalizer, mixer.gate_source, mixer.window, mixer.rope) == (
        "identity",
        "none",
        "hidden",
        0,
        False,
    )
    assert not mixer.foldable


@pytest.mark.parametrize(
    "text", ["", "train:\n  lr: 1.0e-4\n", "train: {warmup: 0, weight_decay: 0, gate_contrast: 0}"]
)
def test_what_is_allowed(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixer: {windw: 64}", "mixer: unknown key 'windw'"),
        ("train: {lr: fast}", "train.lr: expected float"),
        ("train: 3", "train: expected a mapping"),
        ("order: {metric: guess}", "order.metric must be one of kl, kl_worst, greedy, greedy_worst, entropy"),
        ("order: {also: [kl, guess]}", "order.also must be one of .*, found 'guess'"),
        ("order: {also: kl}", "order.also: expected tuple"),
        ("order: {candidates: 0}", "order.candidates must be at least 1"),
        ("data: {tokens: 5}", "at least seq_len"),
        ("train: {batch_tokens: 200000}", r"data.tokens must be at least train.batch_tokens \(200000\)"),
        ("mixer: {window: true}", "window: expected int"),
        ("a: [", "cannot read recipe"),
        ("[]", "expected a mapping, found list"),
        ("{1: 2, a: 3}", "unknown key 1"),
        ("order: {recall_windows: 1, seq_len: 100}", "seq_len is 100: .* at least 152, or recall_windows 0"),
        ("order: {recall_windows: -1}", "recipe.order.recall_windows must be at least 0, found -1"),
        ("train: {lr: -1}", "train.lr must be a number above 0, found -1"),
        ("train: {lr: 0}", "train.lr must be a number above 0"),
        ("train: {lr: .nan}", "train.lr must be a number above 0, found nan"),
        ("train: {grad_clip: .inf}", "train.grad_clip must be a number above 0"),
        ("train: {weight_decay: -0.1}", "train.weight_decay must be a number at least 0"),
        ("train: {gate_contrast: -0.1}", "train.gate_contrast must be a number at least 0"),
        ("train: {warmup: 1.5}", "train.warmup is a share of the steps, at most 1"),
        ("train: {lr: 1e-4}", r"expected float, found '1e-4': write 1\.0e-4$"),
        ("train: {lr: 2.5e3}", r"found '2\.5e3': write 2\.5e\+3$"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot read recipe"):
        Recipe.load(tmp_path / "missing.yaml")
