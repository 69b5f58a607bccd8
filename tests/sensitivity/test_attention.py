"""Metrics of the teacher's attention, against slow definitions and what was planted."""

from __future__ import annotations

import pytest
import torch

from dsla.errors import DataError
from dsla.mixers import DslaConfig
from dsla.sensitivity.attention import attention_entropy, needle_prompts, retrieval_score
from tests.distill.tiny import teacher
from tests.sensitivity.probes import TOKENS, probe, silent


def all_attention(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    model = teacher()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(tokens, output_attentions=True).attentions


def test_entropy_is_that_of_the_teachers_rows() -> None:
    late = [p[:, :, 20:].double() for p in all_attention(TOKENS)]
    expected = [float(-(p * p.clamp_min(1e-30).log()).sum(-1).mean()) for p in late]
    found = attention_entropy(probe(), silent)
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert [found.scores[layer] for layer in found.order] == sorted(found.scores)


def test_retrieval_is_attention_from_the_second_needle_to_what_follows_in_the_first() -> None:
    setting = probe(seed=4)
    prompts, queries, targets = needle_prompts(setting)
    expected = []
    for p in all_attention(prompts):
        mass = [p[i, :, q, t] for i in range(len(prompts)) for q, t in zip(queries, targets[i], strict=True)]
        expected.append(float(torch.stack(mass).mean(0).sum()))
    found = retrieval_score(setting, silent)
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(4, 1), (0, 0), (12, 2), (25, 3)])
def test_needles_lie_beyond_window_and_sinks(window: int, sinks: int) -> None:
    tokens = torch.randint(0, 128, (5, 40), generator=torch.Generator().manual_seed(1))
    prompts, queries, targets = needle_prompts(probe(tokens=tokens, config=DslaConfig(window=window, sinks=sinks)))
    assert len(queries) >= 1 and targets.shape == (5, len(queries))
    for prompt, at in zip(prompts, targets, strict=True):
        assert at.min() >= sinks
        assert (queries - at).min() > window
        assert torch.equal(prompt[at], prompt[queries + 1]), "what is copied is what comes next"
        assert torch.equal(prompt[at - 1], prompt[queries]), "where it is copied from is told by the token read last"
        assert at.max() < queries.min()
    assert len(targets[:, 0].unique()) > 1, "depths differ"
    assert not torch.equal(prompts, tokens)


def test_needles_follow_the_seed() -> None:
    first, same, other = (needle_prompts(probe(seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_layer_with_a_planted_retrieval_head_is_found() -> None:
    """Layer 1's keys name the token before: its attention then looks for what followed the token that is read."""
    model, width = teacher(), 24
    torch.manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(128, width // 2))
    embedding = torch.zeros(128, width)
    embedding[:, : width // 2] = codes
    model.model.embed_tokens.weight.copy_(embedding)
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.zero_()
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            module.weight.mul_(0.01)
    setting = probe(model=model)
    before = retrieval_score(setting, silent)

    class PreviousToken(torch.nn.Module):
        """Keys of the token before, without rotation's help: sharp where query and key carry the same code."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.weight = inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return read(x.roll(1, 1))

    def read(x: torch.Tensor) -> torch.Tensor:
        # The slowest rotation, the last of each half of a head, keeps a code over 40 positions.
        half = x[..., :2] * 40
        heads = torch.zeros(*x.shape[:2], 2, 6)
        heads[..., 2], heads[..., 5] = half[..., :1], half[..., 1:]
        return heads.flatten(2)

    attention = model.model.layers[1].self_attn
    attention.k_proj = PreviousToken(attention.k_proj)
    query = torch.nn.Module()
    query.forward = lambda x: torch.cat([read(x), read(x)], -1)  # type: ignore[method-assign]
    attention.q_proj = query
    after = retrieval_score(setting, silent)
    assert after.order[-1] == 1
    assert after.scores[1] > 3 * max(after.scores[0], after.scores[2], before.scores[1])


def test_text_of_one_token_is_named() -> None:
    with pytest.raises(DataError, match="same token throughout"):
        needle_prompts(probe(tokens=torch.zeros(2, 40, dtype=torch.int64)))
