"""What is evaluated: a loaded model at one level, and the few things tasks ask of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dsla.convert.surgery import Levels
from dsla.errors import ConfigError, DataError
from dsla.evals.forward import Prefix, encode, hidden_states, next_logits, scores, untrained_levels
from dsla.families import context_length

_LOGITS_AT_ONCE = 1 << 24
_CACHED_TOKENS_AT_ONCE = 1 << 15


class Subject:
    """A Hugging Face model with levels, at one of them.

    Args:
        model: a causal language model, as `dsla.load` gives it; with an adapter its levels are under `model.dsla`.
        tokenizer: its tokenizer.

    Attributes:
        model: as given.
        tokenizer: as given.
        context: positions the model was made for, in tokens.
        ends: tokens that end a text.
        level: the level it is set to.
        states_off: states left out of every converted layer.
        untrained: whether converted layers are untrained ones.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.levels: Levels | None = getattr(model, "dsla", None)
        self.context = context_length(model.config)
        self.level, self.states_off, self.untrained = 0, frozenset[int](), False
        self._floor: Levels | None = None
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = frozenset(end for end in (*ends, getattr(tokenizer, "eos_token_id", None)) if end is not None)
        self.set(0)

    @property
    def max_level(self) -> int:
        """The highest level there is."""
        return len(self.levels.mixers) if self.levels else 0

    @property
    def all_states(self) -> frozenset[int]:
        """Indices of all states of a converted layer: without them, window and sinks are left."""
        return frozenset(range(self.levels.plan.mixer.n_states)) if self.levels else frozenset()

    @property
    def setting(self) -> tuple[int, frozenset[int], bool]:
        """Level, states left out, and whether layers are untrained: what scores depend on."""
        return self.level, self.states_off, self.untrained

    def set(self, level: int, states_off: frozenset[int] = frozenset(), untrained: bool = False) -> None:
        """Sets the level.

        Args:
            level: how many layers are converted.
            states_off: states whose reads are left out of every converted layer.
            untrained: convert to layers without an adapter, with states left out: window and sinks of the teacher's own
                attention, the floor that needs no training.

        Raises:
            PlanError: there is no such level.
            ConfigError: there is no such state, or no adapter for a level > 0.
        """
        if self.levels is None:
            if level or states_off or untrained:
                raise ConfigError(f"level {level} needs an adapter, and this model was loaded without one")
            return
        unknown = sorted(states_off - self.all_states)
        if unknown:
            raise ConfigError(f"there is no state {unknown[0]}: converted layers have {len(self.all_states)}")
        if untrained and states_off != self.all_states:
            raise ConfigError("untrained layers have nothing in their states: leave all of them out")
        if untrained and self._floor is None:
            self._floor = untrained_levels(self.model, self.levels)
        inactive, active = (self.levels, self._floor) if untrained else (self._floor, self.levels)
        if inactive is not None:
            inactive.set(0)
        assert active is not None
        for mixer in active.mixers.values():
            mixer.states_off = states_off
        active.set(level)
        self.level, self.states_off, self.untrained = level, states_off, untrained

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Level 0 while it is open, then what was set before."""
        before = self.setting
        self.set(0)
        try:
            yield
        finally:
            self.set(*before)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return encode(self.tokenizer, text)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor, first: int = 0) -> Tensor:
        """Next-token logits after the tokens from place `first` on.

        Args:
            ids: `[T]`.
            first: how many tokens to give none for.

        Returns:
            `[T - first, vocab]` fp32 (fp64 in an fp64 model).

        Raises:
            DataError: there is no token, or more than the model's context.
        """
        return next_logits(self.model, hidden_states(self.model, self._row(ids))[:, first:])[0]

    def token_log_probs(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Log-probability of every token but the first, given those before it: `token_scores` without the second part."""
        return self.token_scores(ids)[0]

    @torch.inference_mode()
    def token_scores(self, ids: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """How well every token but the first is foreseen by those before it; never holds `[T, vocab]`.

        Args:
            ids: `[T]`.

        Returns:
            Log-probabilities `[T - 1]` in nats, fp32 (fp64 in an fp64 model), and whether each is the most likely token,
            `[T - 1]` bool.

        Raises:
            DataError: there is no token, or more than the model's context.
        """
        row = self._row(ids)
        hidden, wanted = hidden_states(self.model, row)[0, :-1], row[0, 1:]
        step = max(1, _LOGITS_AT_ONCE // self.model.config.vocab_size)
        parts = [
            scores(self.model, part, tokens)
            for part, tokens in zip(hidden.split(step), wanted.split(step), strict=True)
        ]
        return torch.cat([log_probs for log_probs, _ in parts]), torch.cat([best for _, best in parts])

    @torch.inference_mode()
    def read(self, ids: Sequence[int], after: Prefix | None = None) -> Prefix:
        """Reads a context once, for any number of continuations.

        Args:
            ids: its tokens, at least one.
            after: what it goes on from; not changed. Default: nothing.

        Raises:
            DataError: there is no token, or more than the model's context.
            ConfigError: `after` was read at another setting.
        """
        self._check(after)
        before = after.ids if after else []
        row = self._row(ids, len(before))
        cache = copy.deepcopy(after.cache) if after else DynamicCache()
        last = hidden_states(self.model, row, cache)[:, -1:]
        return Prefix(
            [*before, *row[0].tolist()], cache, next_logits(self.model, last)[0, 0].log_softmax(-1), self.setting
        )

    @torch.inference_mode()
    def log_likelihoods(
        self, context: Sequence[int] | Prefix, continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation of one context, which is read once.

        Args:
            context: token ids, at least one, or a context that was read.
            continuations: token ids of each, at least one.

        Returns:
            For each, the sum of its tokens' log-probabilities in nats, and whether greedy generation would write it.

        Raises:
            DataError: context or a continuation is empty, or together longer than the model's context.
            ConfigError: the context was read at another setting.
        """
        prefix = context if isinstance(context, Prefix) else self.read(context)
        self._check(prefix)
        for continuation in continuations:
            self._row(continuation, len(prefix.ids))
        first, best = prefix.log_probs, int(prefix.log_probs.argmax())
        results = [(float(first[c[0]]), c[0] == best) for c in continuations]
        longer = [i for i, c in enumerate(continuations) if len(c) > 1]
        for rows in self._batches(longer, len(prefix.ids) + max(map(len, continuations), default=0)):
            for i, (total, greedy) in zip(rows, self._rest(prefix, [continuations[i] for i in rows]), strict=True):
                results[i] = (results[i][0] + total, results[i][1] and greedy)
        return results

    @torch.inference_mode()
    def generate(
        self,
        context: Sequence[int] | Prefix,
        max_tokens: int,
        stop: Sequence[str] = (),
        ends: frozenset[int] | None = None,
    ) -> list[int]:
        """Greedy continuation.

        Args:
            context: token ids, at least one, or a context that was read.
            max_tokens: tokens to write, at most.
            stop: texts that end it.
            ends: tokens that end it. Default: the model's.

        Returns:
            The tokens written, without the one that ends the text; where a stop text ended it, the last tokens complete it.

        Raises:
            DataError: the context is empty, or with `max_tokens` longer than the model's.
            ConfigError: the context was read at another setting.
        """
        known = len(context.ids) if isinstance(context, Prefix) else len(context)
        if known + max_tokens > self.context:
            raise DataError(
                f"{known} tokens and {max_tokens} to write are more than the model's context of {self.context} tokens"
            )
        prefix = context if isinstance(context, Prefix) else self.read(context)
        self._check(prefix)
        cache, written = copy.deepcopy(prefix.cache), list[int]()
        token, ends = int(prefix.log_probs.argmax()), self.ends if ends is None else ends
        while len(written) < max_tokens and token not in ends:
            written.append(token)
            if stop and any(text in self.tokenizer.decode(written) for text in stop):
                break
            if len(written) < max_tokens:
                hidden = hidden_states(self.model, torch.tensor([[token]], device=self.device), cache)
                token = int(next_logits(self.model, hidden)[0, -1].argmax())
        return written

    def generate_text(self, context: Sequence[int] | Prefix, max_tokens: int, stop: Sequence[str] = ()) -> str:
        """The text `generate` writes, up to the first stop text."""
        text: str = self.tokenizer.decode(self.generate(context, max_tokens, stop), skip_special_tokens=True)
        return text[: min([at for at in map(text.find, stop) if at >= 0], default=len(text))]

    def _row(self, ids: Sequence[int] | Tensor, before: int = 0) -> Tensor:
        """`[1, T]` on the model's device, if it is not empty and fits the context."""
        row = torch.as_tensor(ids, dtype=torch.int64, device=self.device).view(1, -1)
        if not row.shape[1]:
            raise DataError("there are no tokens to read: a context and a continuation need at least one each")
        if before + row.shape[1] > self.context:
            raise DataError(
                f"{before + row.shape[1]} tokens are more than the model's context of {self.context} tokens"
            )
        return row

    def _check(self, prefix: Prefix | None) -> None:
        if prefix is not None and prefix.setting != self.setting:
            raise ConfigError("this context was read at another level: read it again")

    def _batches(self, rows: list[int], length: int) -> Iterator[list[int]]:
        size = max(1, _CACHED_TOKENS_AT_ONCE // max(1, length))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _rest(self, prefix: Prefix, continuations: list[Sequence[int]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of all tokens but the first of each, and whether they are the most likely ones."""
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(continuations))
        longest = max(map(len, continuations))
        # What pads a row on the right comes after all that is read of it.
        padded = torch.tensor([[*c, *[c[-1]] * (longest - len(c))] for c in continuations], device=self.device)
        hidden = hidden_states(self.model, padded[:, :-1], cache)
        for row, continuation in zip(hidden, continuations, strict=True):
            wanted = torch.tensor(continuation[1:], device=self.device)
            log_probs, best = scores(self.model, row[: len(wanted)], wanted)
            yield float(log_probs.sum()), bool(best.all())
