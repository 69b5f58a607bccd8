"""The bodies this server answers with, as the OpenAI API has them, with the field `dsla` added."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from dsla.mixers import DslaConfig

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Prompt tokens that an earlier request had computed."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        """Usage with its total."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class DslaInfo(BaseModel):
    """How a request was computed: `levels` is `[[from_token, level], ...]`, `folded_tokens` is summed over layers."""

    levels: list[list[int]]
    folded_tokens: int


class TopLogprob(BaseModel):
    """A token and the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """`logprobs` of a chat completion."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """`logprobs` of a completion, one entry a token; `text_offset` is its place in the text of the choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(BaseModel):
    """The message of a chat completion."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer of a chat completion. `dsla` is there where several are asked for."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    dsla: DslaInfo | None = None


class ChatCompletion(BaseModel):
    """Answer of `POST /v1/chat/completions`. `dsla` is there where one answer is asked for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dsla: DslaInfo | None = None


class TextChoice(BaseModel):
    """One continuation of a prompt. `dsla` is there where the request has several choices."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason
    dsla: DslaInfo | None = None


class Completion(BaseModel):
    """Answer of `POST /v1/completions`. `dsla` is there where the request has one choice."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    dsla: DslaInfo | None = None


class ModelCard(BaseModel):
    """A model that is served; level L has L of its layers converted."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["dsla"] = "dsla"
    max_model_len: int
    max_level: int


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of `GET /health` and `GET /ready`."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer with a status of 400 or more."""

    error: ErrorDetail


class Tokenized(BaseModel):
    """Answer of `POST /tokenize`; `token_strs` is there where it is asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """Answer of `POST /detokenize`."""

    prompt: str


class AdminEvents(BaseModel):
    """Answer of `GET /admin/events`: the latest, oldest first; their `time` and `now` are seconds of the engine's clock.

    `event_count` counts all there ever were.
    """

    now: float
    event_count: int
    events: list[dict[str, Any]]


class Cancelled(BaseModel):
    """Answer of `POST /admin/cancel/ID`: the engine's names of what was ended."""

    cancelled: list[str]


class LayerBytes(BaseModel):
    """Memory of a request in one layer: bytes for each of its tokens, and bytes that do not grow with it."""

    per_token: int
    fixed: int


class AdapterCard(BaseModel):
    """An adapter: the name of its folder, and one SHA-256 of all its layers."""

    name: str
    sha256: str


class AdminPlan(BaseModel):
    """Answer of `GET /admin/plan`. Level k converts the first k layers of `order`.

    `foldable` says whether layers of running requests can be converted, `mixer` how converted layers mix tokens.
    `kept_bytes` are a layer's memory of a request before it is converted, `converted_bytes` after. `mixer` and
    `converted_bytes` are null where no layer can be converted.
    """

    model: str
    layers: int
    order: list[int]
    max_level: int
    foldable: bool
    mixer: DslaConfig | None
    adapter: AdapterCard | None
    kept_bytes: LayerBytes
    converted_bytes: LayerBytes | None


class AdminState(BaseModel):
    """Answer of `GET /admin/state`, `POST /admin/level` and `POST /admin/drain`."""

    model: str
    stats: dict[str, Any]
