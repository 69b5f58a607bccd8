"""Plans from metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsla.distill.recipe import ORDER_METRICS, OrderSettings
from dsla.errors import ConfigError
from dsla.sensitivity import METRICS, label, make_plan, plot_scores
from dsla.sensitivity.metrics import random_order
from tests.distill.tiny import TEACHER, teacher
from tests.sensitivity.probes import CONFIG, TOKENS, probe, silent
from tests.sensitivity.test_measured import trained

CHEAP = {"entropy", "outliers", "retrieval"}


def test_recipes_name_all_metrics() -> None:
    assert tuple(METRICS) == ORDER_METRICS
    assert {name for name, metric in METRICS.items() if metric.cheap} == CHEAP


@pytest.mark.parametrize("metric", [*METRICS])
def test_plan_is_sorted_by_its_metric_and_drawn(metric: str, tmp_path: Path) -> None:
    seen = []
    plan = make_plan(teacher(), TEACHER, TOKENS, CONFIG, OrderSettings(metric), on_progress=lambda *x: seen.append(x))
    assert sorted(plan.order) == [0, 1, 2] and plan.metric == metric
    assert set(plan.scores) == CHEAP | {metric}, "what costs much is not measured unless it is asked for"
    scores = [plan.scores[metric][layer] for layer in plan.order]
    assert scores == sorted(scores)
    assert {name for name, done, total in seen if done == total} == (CHEAP | {metric}) - {"random"}
    plot_scores(plan, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_others_are_recorded_beside_and_trained_ones_say_so(tmp_path: Path) -> None:
    model = teacher()
    mixers = trained(model)
    settings = OrderSettings("greedy", ("kl", "random"), candidates=3)
    floor = make_plan(model, TEACHER, TOKENS, CONFIG, settings)
    assert set(floor.scores) == CHEAP | {"greedy", "kl", "random"}
    plan = make_plan(model, TEACHER, TOKENS, mixers[0].config, settings, mixers)
    assert plan.metric == "greedy_trained"
    assert set(plan.scores) == CHEAP | {"greedy_trained", "kl_trained", "random"}
    assert plan.scores["kl_trained"] != floor.scores["kl"] and plan.scores["entropy"] == floor.scores["entropy"]
    assert plan.scores["greedy_trained"][plan.order[0]] == min(plan.scores["kl_trained"])
    assert label("kl_trained") == "KL, converted alone (nats), trained" and label("newer") == "newer"
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json") == plan


def test_random_follows_the_seed() -> None:
    orders = {seed: random_order(probe(seed=seed), silent).order for seed in range(8)}
    assert orders[3] == random_order(probe(seed=3), silent).order
    assert len(set(orders.values())) > 2


def test_searches_of_other_settings_are_kept_apart(tmp_path: Path) -> None:
    model, settings = teacher(), OrderSettings("kl")
    mixers = trained(model)
    make_plan(model, TEACHER, TOKENS, CONFIG, settings, progress=tmp_path)
    make_plan(model, TEACHER, TOKENS, CONFIG, settings, progress=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    make_plan(model, TEACHER, TOKENS.flip(1), CONFIG, settings, progress=tmp_path)
    make_plan(model, TEACHER, TOKENS, mixers[0].config, settings, mixers, progress=tmp_path)
    mixers[1].q_delta.up.data.zero_()
    make_plan(model, TEACHER, TOKENS, mixers[0].config, settings, mixers, progress=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_windows_that_reach_beyond_nothing_are_named() -> None:
    with pytest.raises(ConfigError, match="seq_len is 12: with a window of 4 and 1 sinks .* at least 13"):
        make_plan(teacher(), TEACHER, TOKENS[:, :12], CONFIG, OrderSettings("entropy"))
    assert make_plan(teacher(), TEACHER, TOKENS[:, :13], CONFIG, OrderSettings("kl")).order


def test_missing_mixers_are_named() -> None:
    model = teacher()
    mixers = trained(model)
    del mixers[1]
    with pytest.raises(ConfigError, match="layer 1 has no trained mixer"):
        make_plan(model, TEACHER, TOKENS, CONFIG, OrderSettings("kl"), mixers)
    assert torch.equal(model(TOKENS).logits, teacher()(TOKENS).logits)
