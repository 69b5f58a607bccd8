"""Passes through a Hugging Face model with levels, in the parts that evaluation needs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsla.convert.adapter import cast
from dsla.convert.surgery import Levels
from dsla.families import attention_shape
from dsla.mixers import DslaMixer
from dsla.ops.shapes import state_dtype


@dataclass(frozen=True)
class Prefix:
    """Tokens a model has read: what goes on from them need not read them again.

    Attributes:
        ids: the tokens.
        cache: the model's memory of them; never changed, continuations work on copies.
        log_probs: of the next token, `[vocab]` fp32 (fp64 in an fp64 model).
        setting: what the subject was set to.
    """

    ids: list[int]
    cache: Any
    log_probs: Tensor
    setting: tuple[int, frozenset[int], bool]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; no special tokens are added, and one longer than the model's context is no reason to warn."""
    ids: list[int] = tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]
    return ids


def hidden_states(model: Any, rows: Tensor, cache: Any = None) -> Tensor:
    """Final hidden states `[B, T, hidden]` of the tokens `[B, T]`, which the cache, if there is one, keeps."""
    decoder = model.get_decoder()
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    out: Tensor = decoder(input_ids=rows, use_cache=cache is not None, **{name: cache}).last_hidden_state
    return out


def next_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits `[..., vocab]` after hidden states `[..., hidden]`, in fp32 (fp64 in an fp64 model)."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits.to(state_dtype(hidden.dtype))


def scores(model: Any, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[T]` of tokens `[T]` after hidden states `[T, hidden]`, and whether they are the most likely."""
    log_probs = next_logits(model, hidden).log_softmax(-1)
    return log_probs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1), log_probs.argmax(-1) == wanted


def untrained_levels(model: Any, levels: Levels) -> Levels:
    """Levels of the same plan whose mixers no training has touched; those of `levels` are left at 0."""
    levels.set(0)
    parameter, shape = next(model.parameters()), attention_shape(model.config)
    mixers = {layer: cast(DslaMixer(levels.plan.mixer, shape), parameter.dtype) for layer in levels.mixers}
    for mixer in mixers.values():
        mixer.to(parameter.device).eval().requires_grad_(False)
    return Levels(model, levels.plan, mixers)
