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
    ("text", "message"),
    [
        ("mixer: {windw: 64}", "mixer: unknown key 'windw'"),
        ("train: {lr: fast}", "train.lr: expected float"),
        ("train: 3", "train: expected a mapping"),
        ("order: {metric: guess}", "order.metric must be kl or entropy"),
        ("data: {tokens: 5}", "at least seq_len"),
        ("mixer: {window: true}", "window: expected int"),
        ("a: [", "cannot read recipe"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot read recipe"):
        Recipe.load(tmp_path / "missing.yaml")
