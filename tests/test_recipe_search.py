"""The recipe search's own mixer is the library's where a row asks for nothing else, and its page says what its results say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsla.mixers import AttentionShape, DslaConfig
from tests.distill.tiny import teacher

ROOT = Path(__file__).parents[1]
SHAPE = AttentionShape(hidden_size=12, n_heads=4, n_kv_heads=2, head_dim=6)
TRAIN = {"shifted": False, "lr": 0.02, "contrast": 0.01, "loss": "attention", "seed": 0, "epochs": 12}


def _module(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


LAB, ROWS = _module("recipe_lab"), _module("recipe_rows")


def _mixer(row: dict[str, Any], seed: int = 0) -> Any:
    config = ROWS.BASE | row["mixer"] | ({"window": 5} if row["mixer"].get("window", 64) else {})
    if config.get("feature_dim"):
        config["feature_dim"] = 4
    torch.manual_seed(seed)
    return LAB.LabMixer(DslaConfig(**config), SHAPE, LAB.Lab(**row["lab"]))


def _inputs(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((12,), (4, 6), (2, 6), (2, 6))
    return [torch.randn(2, tokens, *shape, generator=random) for shape in shapes]


@pytest.mark.parametrize("row", ROWS.ROWS, ids=lambda row: row["name"])
def test_rows_mix_as_the_library_does(row: dict[str, Any]) -> None:
    mixer, inputs = _mixer(row), _inputs(40)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        y, near = mixer.heads(*inputs)
        expected, _ = mixer.prefill(*inputs)
    if row["lab"].get("fed") == "all":
        assert not torch.allclose(y, expected)
    else:
        torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, near)


def test_states_fed_by_all_tokens_are_those_of_a_mixer_without_a_window() -> None:
    """With a negligible window beside them, they read as the states of a mixer whose window is nothing."""
    fed_all = {"mixer": {"mixing": "head"}, "lab": {"fed": "all"}}
    wide, none = _mixer(fed_all), _mixer({"mixer": {"mixing": "head", "window": 0}, "lab": {}})
    none.load_state_dict(wide.state_dict())
    x, q, k, v = _inputs(30)
    for mixer in (wide, none):
        with torch.no_grad():
            mixer.mixing.bias.fill_(29.0)
    torch.testing.assert_close(wide.heads(x, q, k, v)[0], none.heads(x, q, k, v)[0], rtol=1e-4, atol=1e-4)


def test_gates_read_the_value_where_the_row_says_so() -> None:
    mixer = _mixer({"mixer": {}, "lab": {"gate_input": "value"}})
    with torch.no_grad():
        mixer.gates.weight.normal_()
    x, q, k, v = _inputs(30)
    _, values, log_g = mixer._state_inputs(x, k, v, torch.arange(30).expand(2, -1))
    torch.testing.assert_close(log_g[:, 4:], mixer.gates(v)[:, 4:])
    assert not log_g[:, :4].any()
    folded, (_, memory) = mixer.fold(k[0], v[0]), mixer.prefill(x, q, k, v)
    torch.testing.assert_close(folded["states"][0], memory["states"][0])


@pytest.mark.parametrize("loss", ["attention", "mixer", "hidden", "token"])
@pytest.mark.parametrize("projections", [False, True], ids=["deltas", "full projections"])
def test_training_lowers_the_error_and_leaves_the_teacher_alone(loss: str, projections: bool, tmp_path: Path) -> None:
    model = teacher()
    lab_teacher = LAB.Teacher(model, tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = lab_teacher.activations("train", torch.randint(1, 127, (4, 48)), (1,))
    assert torch.equal(lab_teacher.activations("train", torch.zeros(1, 1), (1,))["in.1"], data["in.1"])
    config = DslaConfig(window=4, sinks=2, delta_rank=0 if projections else 3)

    def error(attention: Any) -> float:
        x = lab_teacher.attention_norm(1)(data["in.1"])
        with torch.no_grad():
            found = attention(x, lab_teacher.position(48))[0]
        return float(LAB.relative_error(found, data["out.1"]))

    def mixer() -> Any:
        torch.manual_seed(0)
        return LAB.LabMixer(config, lab_teacher.shape, LAB.Lab(projections=projections))

    untrained = error(lab_teacher.converted(1, mixer()))
    trained = LAB.fit(lab_teacher, 1, mixer(), data, TRAIN | {"loss": loss})
    assert error(trained) < 0.97 * untrained
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_frozen_parameters_stay() -> None:
    mixer = _mixer({"mixer": {}, "lab": {"frozen": ("gates.weight",), "half_life": 100.0}})
    assert not mixer.gates.weight.requires_grad and mixer.gates.bias.requires_grad
    half_life = torch.log(torch.tensor(0.5)) / mixer.gates(torch.zeros(2, 6))
    torch.testing.assert_close(half_life, torch.full_like(half_life, 100.0))


def test_names_and_questions_of_the_rows_are_in_order() -> None:
    names = [row["name"] for row in ROWS.ROWS]
    assert len(set(names)) == len(names)
    assert {row["question"] for row in ROWS.ROWS} == set(ROWS.QUESTIONS)


def test_the_page_is_what_its_results_say() -> None:
    tables = _module("recipe_tables")
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text) == text, "run `python benchmarks/recipe_tables.py`"


def _mean(name: str) -> dict[str, float]:
    return _module("recipe_tables").load()["rows"][name]["mean"]  # type: ignore[no-any-return]


def test_shifted_windows_let_states_help_beyond_the_training_length() -> None:
    results = _module("recipe_tables").load()
    for layer in map(str, results["layers"]):
        shifted, unshifted = (results["rows"][name]["errors"][layer] for name in ("base", "unshifted"))
        assert shifted["4k-8k"] < shifted["4k-8k_off"]
        assert shifted["4k-8k"] < unshifted["4k-8k"]
    assert results["model"]["base"]["4k-8k_kl"] < results["model"]["base, states left out"]["4k-8k_kl"]
    assert results["model"]["unshifted"]["4k-8k_kl"] > results["model"]["base, states left out"]["4k-8k_kl"]


@pytest.mark.parametrize("key", ["512", "2k", "8k", "4k-8k", "copy"])
def test_second_state_shows_without_a_window_and_not_behind_one(key: str) -> None:
    assert _mean("2 states, no window")[key] < 0.95 * _mean("1 state, no window")[key]
    pairs = [("base", "1 state"), ("base, seed 1", "1 state, seed 1"), ("base, seed 2", "1 state, seed 2")]
    changes = [_mean(two)[key] / _mean(one)[key] - 1 for two, one in pairs]
    assert -0.03 < sum(changes) / len(changes) < 0.06
