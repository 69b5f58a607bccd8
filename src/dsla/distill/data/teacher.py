"""Text that the teacher writes itself, for models whose own data is not at hand.

Every other batch of documents starts from nothing but the token that begins a text; the others, where the tokenizer has a chat
template, are conversations: the model first writes the user's turn behind the template's beginning of one, then answers it
(Xu et al., "Magpie", arXiv 2406.08464).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsla.distill.data.sources import Source, TeacherText
from dsla.errors import DataError
from dsla.storage import write_json

NAME = "teacher-text"

_ROWS = 16
_USERS_SHARE = 4
_MOST_EMPTY_BATCHES = 16
_PLACE = "the-user's-words-go-here"

OnTokens = Callable[[int, int], None]
"""Called with (tokens written, tokens in all)."""


def teacher_sources(
    sources: Sequence[Source | TeacherText],
    model: Any,
    tokenizer: Any,
    seq_len: int,
    seed: int,
    out: Path,
    on_tokens: OnTokens = lambda done, total: None,
) -> list[Source]:
    """The sources as files: what the teacher is to write is written first, or was by an earlier call.

    Args:
        sources: of a conversion.
        model: the teacher.
        tokenizer: its tokenizer.
        seq_len: most tokens of a document.
        seed: of the sampling.
        out: folder for `teacher-text.jsonl` and, beside it, its settings; a call that was interrupted, or one for more tokens,
            goes on there, and ends in the same text as one that was not.
        on_tokens: progress.

    Raises:
        DataError: if `out` holds text of other settings, or cannot be written, or the teacher writes nothing.
    """
    files = []
    for source in sources:
        if isinstance(source, TeacherText):
            path = out / f"{NAME}.jsonl"
            try:
                _write(path, model, tokenizer, source.tokens, seq_len, seed, on_tokens)
            except OSError as error:
                raise DataError(f"cannot write {path}: {error.strerror or error}") from error
            source = Source(path, source.weight)
        files.append(source)
    return files


def _write(path: Path, model: Any, tokenizer: Any, tokens: int, seq_len: int, seed: int, on_tokens: OnTokens) -> None:
    settings = {"seq_len": seq_len, "seed": seed, "temperature": 1.0, "rows": _ROWS}
    about = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    # What is in the file is what was written down here after each batch; what is behind it was cut off.
    state: dict[str, Any] = {"settings": settings, "batches": 0, "tokens": 0, "bytes": 0}
    if about.exists():
        state = json.loads(about.read_text(encoding="utf-8"))
        if state["settings"] != settings:
            key = next(key for key in settings if state["settings"].get(key) != settings[key])
            raise DataError(f"{path} has other settings ({key}): choose another --out, or remove {NAME}.*")
        if not path.exists() or path.stat().st_size < state["bytes"]:
            raise DataError(f"{path} is not what {about.name} says: remove {NAME}.* to have it written anew")
    if state["tokens"] >= tokens:
        return
    writer, empty = _Writer(model, tokenizer, seq_len), 0
    with open(path, "ab") as file:
        file.truncate(state["bytes"])
        while state["tokens"] < tokens:
            records = list(writer.documents(state["batches"], seed))
            empty = 0 if records else empty + 1
            if empty == _MOST_EMPTY_BATCHES:
                raise DataError("the teacher ends its texts with their first token: it cannot write training data")
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
            state["batches"] += 1
            state["tokens"] += sum(record["tokens"] for record in records)
            state["bytes"] = file.seek(0, os.SEEK_END)
            write_json(about, state)
            on_tokens(min(state["tokens"], tokens), tokens)


class _Writer:
    """Samples documents from a model.

    Args:
        model: the teacher.
        tokenizer: its tokenizer.
        seq_len: most tokens of a document.

    Raises:
        DataError: if the tokenizer names no token to begin or end a text with, or its template leaves no room.
    """

    def __init__(self, model: Any, tokenizer: Any, seq_len: int) -> None:
        self._model, self._tokenizer, self._seq_len = model, tokenizer, seq_len
        self._device = next(model.parameters()).device
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None or tokenizer.eos_token_id is None:
            raise DataError("the tokenizer names no token that begins or ends a text: set its eos_token")
        self._begin, self._end = begin, tokenizer.eos_token_id
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        if self._chat:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": _PLACE}], tokenize=False)
            before, place, after = shown.partition(_PLACE)
            if not place:
                raise DataError("the chat template does not show a user's message as it is: teacher text needs that")
            self._user, self._user_ends = self._ids(before), [*self._ids(after)[:1], self._end]
            if len(self._user) + seq_len // _USERS_SHARE >= seq_len:
                raise DataError(f"the chat template takes {len(self._user)} tokens, the recipe's seq_len is {seq_len}")

    def documents(self, batch: int, seed: int) -> Iterator[dict[str, Any]]:
        """Records of one batch; what they are follows from the seed and the batch's number."""
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed * 1_000_003 + batch)
            yield from self._conversations() if self._chat and batch % 2 else self._texts()

    def _texts(self) -> Iterator[dict[str, Any]]:
        for ids in self._sample([[self._begin]] * _ROWS, [self._end], self._seq_len - 1):
            if ids:
                yield {"text": self._text([self._begin, *ids], special=True), "tokens": len(ids)}

    def _conversations(self) -> Iterator[dict[str, Any]]:
        turns = self._sample([self._user] * _ROWS, self._user_ends, self._seq_len // _USERS_SHARE)
        asked = [(len(ids), text) for ids in turns if (text := self._text(ids, special=False).strip())]
        prompts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for _, text in asked
        ]
        rows = [self._ids(prompt) for prompt in prompts]
        fits = [i for i, row in enumerate(rows) if len(row) < self._seq_len]
        if not fits:
            return
        room = self._seq_len - max(len(rows[i]) for i in fits)
        for i, ids in zip(fits, self._sample([rows[i] for i in fits], [self._end], room), strict=True):
            if answer := self._text(ids, special=False).strip():
                tokens, question = asked[i]
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield {"messages": messages, "tokens": tokens + len(ids)}

    @torch.no_grad()
    def _sample(self, prompts: Sequence[list[int]], ends: list[int], most: int) -> list[list[int]]:
        """What the model adds to each prompt, up to the first of `ends` or `most` tokens."""
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        padded = torch.tensor([[self._end] * (width - len(row)) + row for row in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self._device)
        sampling = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=most,
            eos_token_id=ends, pad_token_id=self._end, bos_token_id=self._begin,
        )  # fmt: skip
        added: Tensor = self._model.generate(padded, attention_mask=mask, generation_config=sampling)[:, width:]
        return [_before(row, ends) for row in added.tolist()]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer([text], add_special_tokens=False)["input_ids"][0]
        return ids

    def _text(self, ids: list[int], special: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def _before(ids: list[int], ends: Sequence[int]) -> list[int]:
    place = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:place]
