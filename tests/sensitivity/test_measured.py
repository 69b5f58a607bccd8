"""Measured metrics against brute force over whole models."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsla.convert.surgery import ConvertedAttention
from dsla.errors import ModelError, PlanError
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity import METRICS
from dsla.sensitivity.journal import Journal
from dsla.sensitivity.measured import Trial, floor_mixer, greedy_kl, mean, mean_and_worst, measured_kl
from tests.distill.tiny import teacher
from tests.sensitivity.probes import CONFIG, TOKENS, probe, silent

N = 6


def deep() -> LlamaForCausalLM:
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=128, hidden_size=24, intermediate_size=40, num_hidden_layers=N, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=128, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def trained(model: Any) -> dict[int, DslaMixer]:
    torch.manual_seed(9)
    config = DslaConfig(window=4, sinks=1, delta_rank=2)
    mixers = {i: DslaMixer(config, attention_shape(model.config)).eval() for i in range(len(model.model.layers))}
    for mixer in mixers.values():
        mixer.q_delta.up.data.normal_(0, 0.3)
    return mixers


def kl_of(
    model: Any, converted: Iterable[int], mixers: dict[int, DslaMixer] | None = None, tokens: torch.Tensor = TOKENS
) -> float:
    """KL to the teacher at every eighth token, by running the whole model."""
    with torch.no_grad():
        before = model(tokens).logits[:, ::8].log_softmax(-1)
        softmax = {i: model.model.layers[i].self_attn for i in converted}
        for i, attention in softmax.items():
            mixer = mixers[i] if mixers else DslaMixer(CONFIG, attention_shape(model.config))
            if not mixers:
                mixer.states_off = mixer.all_states
            model.model.layers[i].self_attn = ConvertedAttention(attention, mixer, family_of(model.config))
        after = model(tokens).logits[:, ::8].log_softmax(-1)
        for i, attention in softmax.items():
            model.model.layers[i].self_attn = attention
    return float((before.exp() * (before - after)).sum(-1).mean())


def brute_force(model: Any, mixers: dict[int, DslaMixer] | None = None) -> tuple[list[int], list[float]]:
    order, scores = [], [0.0] * N
    while len(order) < N:
        found = {i: kl_of(model, [*order, i], mixers) for i in range(N) if i not in order}
        best = min(found, key=found.get)
        order.append(best)
        scores[best] = found[best]
    return order, scores


@pytest.mark.parametrize("with_adapter", [False, True], ids=["floor", "trained"])
def test_kl_is_that_of_the_logits_and_leaves_the_model_as_it_was(with_adapter: bool) -> None:
    model = teacher()
    mixers = trained(model) if with_adapter else None
    before = model(TOKENS).logits
    found = measured_kl(probe(model=model, trained=mixers), silent).scores
    expected = [kl_of(model, [i], mixers) for i in range(3)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("with_adapter", [False, True], ids=["floor", "trained"])
def test_greedy_with_all_candidates_is_brute_force(with_adapter: bool) -> None:
    model = deep()
    mixers = trained(model) if with_adapter else None
    before = model(TOKENS).logits
    order, scores = brute_force(model, mixers)
    found = greedy_kl(probe(model=model, trained=mixers, candidates=N), silent)
    assert list(found.order) == order
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(scores), rtol=1e-3, atol=1e-5)
    assert torch.equal(model(TOKENS).logits, before)


def test_worst_window_counts_as_much_as_all_together() -> None:
    model = deep()
    mixers = trained(model)
    found = measured_kl(probe(model=model, trained=mixers), silent, mean_and_worst).scores
    expected = []
    for layer in range(N):
        each = [kl_of(model, [layer], mixers, window) for window in TOKENS.split(1)]
        expected.append(sum(each) / len(each) + max(each))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    first = METRICS["greedy_worst"].rank(probe(model=model, trained=mixers, candidates=N), silent)
    assert first.scores[first.order[0]] == min(found)


def test_greedy_tries_as_many_layers_as_it_says() -> None:
    model, journal, seen = deep(), Journal(), list[tuple[int, int]]()
    found = greedy_kl(probe(model=model, candidates=2, journal=journal), lambda *step: seen.append(step))
    total = N + 2 + 2 + 2 + 2 + 1
    assert seen == [(i + 1, total) for i in range(total)]
    assert sorted(found.order) == list(range(N))
    for place, layer in enumerate(found.order):
        converted = found.order[: place + 1]
        assert found.scores[layer] == mean(journal.find(converted)) == pytest.approx(kl_of(model, converted), rel=1e-3)
    alone = [mean(journal.find([i])) for i in range(N)]
    second = sorted(set(range(N)) - {found.order[0]}, key=lambda layer: alone[layer])[:2]
    tried = [i for i in range(N) if i != found.order[0] and journal.find([found.order[0], i]) is not None]
    assert sorted(second) == tried and found.order[1] in second


def test_greedy_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy_kl(probe(model=deep(), candidates=N), silent)
    path = tmp_path / "progress" / "search.json"

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    model = deep()
    before = model(TOKENS).logits
    with pytest.raises(KeyboardInterrupt):
        greedy_kl(probe(model=model, candidates=N, journal=Journal(path)), stop)
    assert torch.equal(model(TOKENS).logits, before), "the model is the teacher again"
    added = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, layers, kl: (added.append(tuple(layers)), add(self, layers, kl)))
    assert greedy_kl(probe(model=model, candidates=N, journal=Journal(path)), silent) == expected
    assert len(added) == sum(range(1, N + 1)) - 9
    added.clear()
    assert measured_kl(probe(model=model, candidates=N, journal=Journal(path)), silent).scores
    assert added == [], "layers alone are the first round of the search"


@pytest.mark.parametrize("content", ["{", "[1]", '{"1": "x"}', '{"1": 0.5}'])
def test_damaged_journal_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(PlanError, match=r"search\.json is damaged .*: remove it"):
        Journal(tmp_path / "search.json")


def test_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot write"):
        Journal(tmp_path / "file" / "search.json").add([1], (0.5,))


def test_predictions_that_are_not_finite_are_named() -> None:
    model = teacher()
    mixers = trained(model)
    mixers[1].o_delta.up.data.fill_(float("nan"))
    with Trial(probe(model=model, trained=mixers)) as trial:
        trial.kls_with(0)
        with pytest.raises(ModelError, match="with layer 1 converted the model's predictions are not finite"):
            trial.kls_with(1)


@pytest.mark.parametrize(
    ("normalizer", "feature_map", "window"),
    list(itertools.product(["shared", "state"], ["hedgehog", "softmax"], [0, 4])) + [("none", "identity", 0)],
)
def test_floor_is_the_layer_without_its_states(normalizer: str, feature_map: str, window: int) -> None:
    config = DslaConfig(window=window, sinks=min(window, 2), normalizer=normalizer, feature_map=feature_map, n_states=4)
    cheap, full = floor_mixer(probe(config=config)), DslaMixer(config, attention_shape(teacher().config))
    full.states_off = full.all_states
    q, k, v = (torch.randn(2, 20, heads, 6) for heads in (4, 2, 2))
    torch.testing.assert_close(cheap.prefill(q, q, k, v)[0], full.prefill(q, q, k, v)[0])
    assert cheap.state_spec(torch.float32).fixed_bytes < full.state_spec(torch.float32).fixed_bytes
