"""From conversations to text and token ids, by the model's own chat template; for the server and the command line alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from dsla.errors import ModelError, RequestError


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], generation_prompt: bool = True) -> str:
    """Text of a conversation.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        messages: `{"role", "content"}` each.
        generation_prompt: end with the template's beginning of an answer.

    Raises:
        ModelError: the model has no chat template.
        RequestError: its template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template: use /v1/completions or `dsla generate --raw`")
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}", param="messages") from error
    return text


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, ready for the answer; arguments and errors as `render_chat`."""
    tokens: list[int] = tokenizer(render_chat(tokenizer, messages), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return tokens
