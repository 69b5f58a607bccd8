"""Layer scores against slow definitions, and the plan they give."""

from __future__ import annotations

from pathlib import Path

import torch

from dsla.convert.surgery import ConvertedAttention
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from dsla.sensitivity import make_plan, plot_scores
from dsla.sensitivity.metrics import attention_entropy, measured_kl
from tests.distill.tiny import TEACHER, teacher

TOKENS = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
CONFIG = DslaConfig(window=4, sinks=1, delta_rank=0)


def silent(done: int, total: int) -> None:
    pass


def test_entropy_is_that_of_the_teachers_rows() -> None:
    model = teacher()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = model(TOKENS, output_attentions=True).attentions
    expected = []
    for p in rows:
        late = p[:, :, 20:].double()
        expected.append(float(-(late * late.clamp_min(1e-30).log()).sum(-1).mean()))
    model.set_attn_implementation("sdpa")
    found = attention_entropy(model, TOKENS, CONFIG, silent)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_kl_is_that_of_the_logits_and_leaves_the_model_as_it_was() -> None:
    model = teacher()
    found = measured_kl(model, TOKENS, CONFIG, silent)
    with torch.no_grad():
        before = model(TOKENS).logits
    expected = []
    for layer in model.model.layers:
        softmax = layer.self_attn
        mixer = DslaMixer(CONFIG, attention_shape(model.config))
        mixer.states_off = True
        layer.self_attn = ConvertedAttention(softmax, mixer, family_of(model.config))
        with torch.no_grad():
            after = model(TOKENS).logits[:, ::4].log_softmax(-1)
        layer.self_attn = softmax
        p = before[:, ::4].log_softmax(-1)
        expected.append(float((p.exp() * (p - after)).sum(-1).mean()))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_plan_is_sorted_by_its_metric_and_drawn(tmp_path: Path) -> None:
    seen = []
    plan = make_plan(teacher(), TEACHER, TOKENS, CONFIG, "entropy", lambda *step: seen.append(step))
    assert sorted(plan.order) == [0, 1, 2]
    scores = [plan.scores["entropy"][layer] for layer in plan.order]
    assert scores == sorted(scores) and set(plan.scores) == {"kl", "entropy"}
    assert seen[-1][1:] == (3, 3)
    plot_scores(plan, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000
