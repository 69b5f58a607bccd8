"""A model at a level, as lm-evaluation-harness asks for one. Importing this needs `lm-eval`, and registers the model `dsla`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dsla.convert import load
from dsla.errors import ConfigError
from dsla.evals.subject import Subject

_MAX_TOKENS = 256

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, and their tokens."""


class SubjectLM(TemplateLM):
    """What the harness asks, answered by a subject as it is set.

    Texts become tokens as in the harness's own `hf` model: with the special tokens the tokenizer puts by itself, and after the
    first special token there is where there is no context. What does not fit the model's context is refused, never cut.

    Args:
        subject: who answers.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.tokenizer = subject, subject.tokenizer
        self._device = subject.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts calls the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text the model expects."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens unless told otherwise or they are there already."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Every context is read once, whatever follows it."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for at, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(at)
        answers: dict[int, tuple[float, bool]] = {}
        for tokens, places in tqdm(by_context.items(), desc="contexts", disable=disable_tqdm):
            found = self.subject.log_likelihoods(tokens, [requests[at][2] for at in places])
            for at, answer in zip(places, found, strict=True):
                answers[at] = answer
                self.cache_hook.add_partial("loglikelihood", requests[at][0], answer)
        return [answers[at] for at in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        totals = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.subject.context - 1, context_len=1
            )
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                scores = self.subject.token_log_probs([*context, *continuation])
                total += float(scores[-len(continuation) :].sum())
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, greedily, up to a stop text.

        Raises:
            ConfigError: a task wants sampling.
        """
        texts = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, asked = request.args
            settings = normalize_gen_kwargs(asked, _MAX_TOKENS)
            if settings["do_sample"]:
                raise ConfigError("the task samples, and evaluation is greedy: pass --gen_kwargs do_sample=False")
            text = self.subject.generate_text(self.tok_encode(context), settings["max_gen_toks"], settings["until"])
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, asked), text)
        return texts


@register_model("dsla")
class HarnessLM(SubjectLM):
    """The model the harness makes of `--model dsla --model_args model=...,adapter=...,level=...`.

    Args:
        model: folder or hub name. Default: SmolLM2-135M-Instruct.
        adapter: adapter folder. Default: the shipped one that belongs to the model.
        level: how many layers are converted.
        dtype: of the weights, as `float32`. Default: the checkpoint's.
        device: where the model runs.
        batch_size: the harness always passes one; continuations of a context are computed together whatever it is.
        max_batch_size: likewise.

    Raises:
        ConfigError: there is no such dtype or device.
        DslaError: as `dsla.load`.
    """

    def __init__(
        self,
        model: str | None = None,
        adapter: str | Path | None = None,
        level: int = 0,
        dtype: str | None = None,
        device: str = "cpu",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        found = None if dtype is None else getattr(torch, dtype, None)
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ConfigError(f"dtype: expected float32, bfloat16, float16 or float64, found {dtype!r}")
        subject = Subject(*load(model, adapter, level, found, device))
        subject.set(level)
        super().__init__(subject)
