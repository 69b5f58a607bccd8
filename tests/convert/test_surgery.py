"""The Hugging Face face: level 0 is the teacher bit for bit, generation with a cache equals one without, levels rise live."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from dsla.convert.plan import Plan, Teacher
from dsla.convert.surgery import Levels
from dsla.errors import ModelError, PlanError
from dsla.mixers import DslaConfig
from tests.engine.tiny import MIXER, ORDER, reference_logits, tiny_mixers, tiny_model

# transformers computes its norms in fp32, whatever the model's dtype; the engine, which does not, is held to 1e-9.
TOLERANCE = 2e-5
PROMPT = torch.randint(0, 60, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():  # type: ignore[no-untyped-def]
    """The shared tiny model, its levels attached, back at level 0 afterwards."""
    net = tiny_model()
    net.dsla = Levels(net, Plan(Teacher("tiny", "0" * 64, 4), ORDER, MIXER), tiny_mixers())
    yield net
    net.dsla.set(0)


def test_level_0_is_the_teacher_bit_for_bit(model) -> None:  # type: ignore[no-untyped-def]
    expected = model(PROMPT).logits
    model.dsla.set(3)
    assert not torch.equal(model(PROMPT).logits, expected)
    model.dsla.set(0)
    assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_matches_the_reference(model, level: int) -> None:  # type: ignore[no-untyped-def]
    model.dsla.set(level)
    for row in PROMPT:
        expected = reference_logits(row.tolist(), [(0, level)], tiny_mixers())
        torch.testing.assert_close(model(row.unsqueeze(0)).logits[0], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("level", [1, 3])
def test_cached_and_chunked_equals_one_pass(model, level: int) -> None:  # type: ignore[no-untyped-def]
    model.dsla.set(level)
    expected = model(PROMPT).logits
    cache, pieces = DynamicCache(config=model.config), []
    for part in PROMPT.split([9, 1, 1, 7, 5], 1):
        pieces.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert cache.get_seq_length() == PROMPT.shape[1]


@pytest.mark.parametrize("at", [1, 3, 8, 22])
def test_level_rises_in_a_running_generation(model, at: int) -> None:  # type: ignore[no-untyped-def]
    cache = DynamicCache(config=model.config)
    head = model(PROMPT[:, :at], past_key_values=cache).logits
    model.dsla.set(3)
    tail = model(PROMPT[:, at:], past_key_values=cache).logits
    for row, found in zip(PROMPT, torch.cat([head, tail], 1), strict=True):
        expected = reference_logits(row.tolist(), [(0, 0), (at, 3)], tiny_mixers())
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("level", [0, 2, 3])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_equals_stepwise_argmax(model, level: int, beams: int) -> None:  # type: ignore[no-untyped-def]
    model.dsla.set(level)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 60}
    cached = model.generate(PROMPT, **settings)
    assert torch.equal(cached, model.generate(PROMPT, use_cache=False, **settings))


def test_all_layers_converted_still_count_tokens() -> None:
    net = tiny_model()
    order = tuple(range(4))
    shape_mixers = tiny_mixers()
    mixers = dict.fromkeys(order, shape_mixers[ORDER[0]])
    levels = Levels(net, Plan(Teacher("tiny", "0" * 64, 4), order, MIXER), mixers)
    levels.set(4)
    try:
        text = net.generate(PROMPT, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=60)
        assert text.shape == (2, 28)
    finally:
        levels.set(0)


def test_bad_levels_padding_caches_and_going_back_are_refused(model) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match="levels 0 to 3"):
        model.dsla.set(4)
    mask = torch.ones_like(PROMPT)
    mask[0, 0] = 0
    model(PROMPT, attention_mask=mask)
    model.dsla.set(1)
    with pytest.raises(ModelError, match="padded batches"):
        model(PROMPT, attention_mask=mask)
    with pytest.raises(ModelError, match="DynamicCache"):
        model(PROMPT, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    cache = DynamicCache(config=model.config)
    model(PROMPT, past_key_values=cache)
    model.dsla.set(0)
    with pytest.raises(ModelError, match="cannot become attention again"):
        model(PROMPT[:, :1], past_key_values=cache)


def test_saved_at_any_level_it_is_the_teacher(model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    names = set(tiny_model().state_dict())
    model.dsla.set(3)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    model.dsla.set(0)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


def test_moved_models_and_own_masks_are_refused(model) -> None:  # type: ignore[no-untyped-def]
    model.dsla.set(1)
    causal = torch.ones(23, 23).tril().bool().view(1, 1, 23, 23)
    with pytest.raises(ModelError, match="masks of one's own"):
        model(PROMPT, attention_mask=causal.expand(2, -1, -1, -1))
    mixers = model.dsla.mixers
    model.dsla.mixers = {layer: copy.deepcopy(mixer).to("meta") for layer, mixer in mixers.items()}
    with pytest.raises(ModelError, match="give the device to dsla.load"):
        model(PROMPT)
    model.dsla.mixers = mixers


def test_missing_layers_are_named() -> None:
    levels = Levels(tiny_model(), Plan(Teacher("tiny", "0" * 64, 4), (2, 1), DslaConfig()), {2: tiny_mixers()[2]})
    with pytest.raises(ModelError, match="needs layer 1"):
        levels.set(2)
