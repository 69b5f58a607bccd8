"""States kept in bfloat16 through the engine: levels, folds, prefixes and chunks, on a tiny model the kernels compute."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dsla.convert.adapter import cast
from dsla.engine import PackedDecoder, SamplingParams
from dsla.engine.weights import build_weights
from dsla.errors import ModelError
from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig, DslaMixer
from tests.engine.tiny import RecordingEngine, random_prompt, tiny_decoder, tiny_engine, tiny_model

ORDER = (2, 0, 1)
MIXER = DslaConfig(window=4, sinks=2, delta_rank=3)
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
PROMPT = random_prompt(90)


@cache
def decoder(states: torch.dtype) -> PackedDecoder:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1, eos_token_id=60,
        bos_token_id=None,
    )  # fmt: skip
    dtype, family = torch.bfloat16, family_of(config)
    weights = build_weights(LlamaForCausalLM(config).to(dtype).state_dict(), config, family, dtype)
    shape = attention_shape(config)
    mixers = {layer: cast(DslaMixer(MIXER, shape), dtype).eval().requires_grad_(False) for layer in ORDER}
    for mixer in mixers.values():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return PackedDecoder(weights, config, family, mixers, states)


def make_engine(states: torch.dtype, step_tokens: int = 200, level: int = 3) -> RecordingEngine:
    engine = tiny_engine(units=4000, decoder=decoder(states), max_step_tokens=step_tokens)
    engine.set_level(level)
    return engine


def answer(engine: RecordingEngine, prompt: list[int], name: str = "x", raise_at: int = 0) -> Tensor:
    """Logits of 20 tokens behind a prompt; all layers are converted after so many steps."""
    engine.add_request(prompt, PARAMS, request_id=name)
    for _ in range(raise_at):
        engine.step()
    engine.set_level(3)
    engine.run()
    assert engine.final[name].levels[-1][1] == 3
    return torch.stack(engine.logits[name]).double()


def error(found: Tensor, expected: Tensor) -> float:
    """Relative RMS difference."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("step_tokens", [200, 7, 2], ids=["whole", "chunks", "pairs"])
def test_first_logits_as_with_fp32_states(step_tokens: int) -> None:
    found, expected = (
        answer(make_engine(torch.bfloat16, step_tokens), PROMPT),
        answer(make_engine(torch.float32), PROMPT),
    )
    assert error(found[0], expected[0]) < 0.03


def test_a_level_rises_within_the_prompt() -> None:
    found, expected = (answer(make_engine(x, 40, 0), PROMPT, raise_at=2) for x in (torch.bfloat16, torch.float32))
    assert error(found[0], expected[0]) < 0.03


def test_a_level_rises_while_the_answer_is_written() -> None:
    found, expected = (answer(make_engine(x, 40, 0), PROMPT, raise_at=8) for x in (torch.bfloat16, torch.float32))
    assert torch.equal(found[0], expected[0])
    assert error(found[:8], expected[:8]) < 0.03


def test_the_states_of_a_text_are_gone_on_from() -> None:
    engine = make_engine(torch.bfloat16, 50)
    answer(engine, PROMPT)
    longer = [*PROMPT, *engine.outputs["x"], *random_prompt(10, 1)]
    found = answer(engine, longer, "longer")
    assert engine.final["longer"].cached_tokens > 100
    assert error(found[0], answer(make_engine(torch.float32), longer)[0]) < 0.03


def test_slots_are_smaller() -> None:
    half, whole = (decoder(states).slot_spec for states in (torch.bfloat16, torch.float32))
    assert half is not None and whole is not None
    assert whole.fixed_bytes - half.fixed_bytes == 2 * 2 * 64 * 33 * 2


@pytest.mark.parametrize(
    ("states", "model"),
    [(torch.bfloat16, torch.float64), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_states_that_do_not_go_with_the_model_are_refused(states: torch.dtype, model: torch.dtype) -> None:
    tiny, config = tiny_decoder(dtype=model), tiny_model().config
    with pytest.raises(ModelError, match=f"do not go with a model in {str(model).removeprefix('torch.')}"):
        PackedDecoder(tiny.weights, config, family_of(config), tiny.mixers, states)
