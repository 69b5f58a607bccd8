"""The requests of the OpenAI API that this server takes, and the `dsla` fields it adds.

A field of that API which is not implemented accepts only values that ask for nothing (so that clients which always send
their defaults work) and is refused by name otherwise. Any other field is refused as unknown.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dsla.engine import MAX_LOGPROBS

MAX_PROMPTS = 256
MAX_ANSWERS = 16
MAX_STOPS = 16


class ApiModel(BaseModel):
    """Base of all bodies: exact types, no unknown fields, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def only(*accepted: object) -> AfterValidator:
    """Marks a field as not implemented: takes None and the `accepted` values, refuses others."""

    def check(value: object) -> object:
        if value is None or value in accepted:
            return value
        raise PydanticCustomError("unsupported", "it is not supported by this server; leave it out")

    return AfterValidator(check)


def _text(text: str) -> str:
    """Refuses half a surrogate pair, which JSON can write and no tokenizer reads."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("string_unicode", "a text holds half a surrogate pair") from None
    return text


def _prompts(value: object) -> list[str] | list[list[int]]:
    """The four forms of a completion prompt, as a list of prompts."""
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return _counted([_text(item) for item in value])
        if _are_tokens(value):
            return [value]
        if all(isinstance(item, list) and item and _are_tokens(item) for item in value):
            return _counted(value)
    raise PydanticCustomError(
        "prompt_type", "expected a text, a list of texts, token ids, or a list of lists of token ids, none empty"
    )


def _are_tokens(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _counted(prompts: list[Any]) -> list[Any]:
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", f"at most {MAX_PROMPTS} prompts in one request, found {len(prompts)}")
    return prompts


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "expected a text or a list of texts")
    if "" in stops:
        raise PydanticCustomError("string_too_short", "a stop text must not be empty")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("too_long", f"at most {MAX_STOPS} stop texts, found {len(stops)}")
    return tuple(_text(stop) for stop in stops)


def _biases(value: object) -> dict[int, float]:
    """Token ids are texts in JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(type(bias) in (int, float) for bias in value.values()):
        raise PydanticCustomError("bias_type", "expected an object of token ids and numbers")
    if not all(isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20 for token in value):
        raise PydanticCustomError("bias_type", 'expected token ids as names, such as {"50256": -100}')
    try:
        return {int(token): float(bias) for token, bias in value.items()}
    except OverflowError:
        raise PydanticCustomError("finite_number", "a bias is too large a number") from None


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(ApiModel):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: Annotated[bool | None, only(False)] = None


class DslaOptions(ApiModel):
    """Which levels a request may have: how many layers may be converted to linear attention for it."""

    quality: Literal["full", "balanced", "fast"] | None = Field(
        default=None, description="full: never converted; balanced: up to half of the levels; fast: all levels"
    )
    max_level: int | None = Field(default=None, ge=0, description="level that this request is never raised above")
    min_level: int | None = Field(default=None, ge=0, description="level that this request starts at, at least")
    stream_levels: bool = Field(default=False, description="with `stream`: `dsla` is in every chunk that has text")


class JsonSchema(ApiModel):
    """`response_format.json_schema`."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="accepted and not used: answers always follow the schema")


class ResponseFormat(ApiModel):
    """What answers have to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, description="with the type `json_schema`")

    @model_validator(mode="after")
    def _schema_and_type_go_together(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise PydanticCustomError("only_with", "'json_schema' goes with the type 'json_schema', and with no other")
        return self


class TextPart(ApiModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_text)]


class Message(ApiModel):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]
    # An assistant message that came from a server is sent back with these.
    refusal: Annotated[str | None, only()] = None
    name: Annotated[str | None, only()] = None
    annotations: Annotated[list[Any] | None, only([])] = None
    audio: Annotated[dict[str, Any] | None, only()] = None
    tool_calls: Annotated[list[Any] | None, only([])] = None
    function_call: Annotated[dict[str, Any] | None, only()] = None

    @property
    def text(self) -> str:
        """All text of the message."""
        return "".join(part.text for part in self.content)


class GenerationRequest(ApiModel):
    """What chat completions and completions have in common."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=0, ge=-1, description="0 or -1: all tokens")
    min_p: float | None = Field(default=0.0, ge=0, lt=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)] = ()
    ignore_eos: bool = False
    min_tokens: int | None = Field(default=0, ge=0, description="tokens generated before an end token may come")
    n: int | None = Field(default=1, ge=1, le=MAX_ANSWERS, description="answers to each prompt")
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=1.0, ge=0.01, le=100, description="1: off")
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float] | None)] = (
        Field(default={}, description="token id: -100 to 100, added to its logit")
    )
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    dsla: DslaOptions = DslaOptions()
    user: str | None = Field(default=None, description="accepted and not used")

    @model_validator(mode="after")
    def _options_of_streams_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("only_with", "'stream_options' is allowed only when 'stream' is true")
        if self.dsla.stream_levels and not self.stream:
            raise PydanticCustomError("only_with", "'dsla.stream_levels' is allowed only when 'stream' is true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most, None = as many as the engine grants a request that does not say."""
        return self.max_tokens

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON Schema that answers follow, None = they are any text."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        return {"type": "object"} if schema is None else schema.definition

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many of the most likely tokens are reported beside each token; None = no probabilities at all."""


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    tools: Annotated[list[Any] | None, only([])] = None
    tool_choice: Annotated[str | dict[str, Any] | None, only("none", "auto")] = None
    parallel_tool_calls: Annotated[bool | None, only(False, True)] = None
    functions: Annotated[list[Any] | None, only([])] = None
    function_call: Annotated[str | dict[str, Any] | None, only("none", "auto")] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None
    store: Annotated[bool | None, only(False)] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("only_one", "give 'max_completion_tokens' or 'max_tokens', not both")
        return self

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs_need_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("only_with", "it is allowed only when 'logprobs' is true")
        return value

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    echo: Annotated[bool | None, only(False)] = None
    best_of: Annotated[int | None, only(1)] = None
    suffix: Annotated[str | None, only("")] = None

    @property
    def top_count(self) -> int | None:
        return self.logprobs


class LevelRequest(ApiModel):
    """Body of `POST /admin/level`."""

    level: int | None = Field(ge=0, description="level of all requests from now on; null: adaptive again")


class TokenizeRequest(ApiModel):
    """Body of `POST /tokenize`."""

    model: str | None = None
    prompt: Annotated[str | None, AfterValidator(lambda text: text if text is None else _text(text))] = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = Field(
        default=None, description="default: true with a prompt, false with messages"
    )
    add_generation_prompt: bool = Field(default=True, description="with messages: end with the beginning of an answer")
    return_token_strs: bool | None = Field(default=False, description="what the vocabulary calls the tokens, too")

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("only_one", "give 'prompt' or 'messages', one of them")
        return self


class DetokenizeRequest(ApiModel):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


class DrainRequest(ApiModel):
    """Body of `POST /admin/drain`; without a body, it drains."""

    draining: bool = Field(default=True, description="false: take requests again")
