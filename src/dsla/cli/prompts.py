"""From conversations to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsla.errors import ConfigError


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, ready for the answer.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        messages: `{"role", "content"}` each.

    Raises:
        ConfigError: the model has no chat template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError("this model has no chat template: use `dsla generate --raw`")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from None
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens
