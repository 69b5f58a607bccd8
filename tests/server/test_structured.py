"""Answers that are JSON of a schema: what the model may write, over HTTP and token by token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerFast

from dsla.engine import Engine, EngineConfig, SamplingParams
from dsla.server import schema_check, structured
from dsla.server.detokenize import Detokenizer, TokenBytes
from dsla.server.errors import ApiError
from dsla.server.structured import MAX_SCHEMA_BYTES, MAX_WAITING, JsonSchemas
from tests.server.asgi import app_of, error, until
from tests.server.conftest import MODEL, Served
from tests.server.test_detokenize import fallback_tokenizer
from tests.server.test_openai import MESSAGES, events
from tests.server.tiny import tiny_decoder, tiny_tokenizer

pytest.importorskip("llguidance", reason="needs llguidance, which the extra `serve` installs")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Leg(BaseModel):
    model_config = ConfigDict(extra="forbid")

    joint: Literal["hip", "knee", "ankle"]
    bent: bool


class Animal(BaseModel):
    """All of it is bounded, so that a model that knows nothing comes to an end."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=6)
    kind: Literal["fox", "dog", '🦆 "quoted"']
    age: int = Field(ge=0, le=30)
    weight: float | None = Field(ge=0, le=2)
    legs: list[Leg] = Field(max_length=2)


def json_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


ANIMAL = json_schema(Animal.model_json_schema())
TEXT_BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick", "max_tokens": 400, "seed": 5, **ANIMAL}
CHAT_BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 400, "seed": 5, **ANIMAL}


def choices(served: Served, path: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    """Text and end of every answer, which are the same in a stream."""
    response = served.http.post(path, json=body)
    assert response.status_code == 200, response.text
    found = [
        (c["message"]["content"] if path == CHAT else c["text"], c["finish_reason"]) for c in response.json()["choices"]
    ]
    texts, ends = [""] * len(found), [""] * len(found)
    for chunk in events(served, path, body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    assert list(zip(texts, ends, strict=True)) == found
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1, "logprobs": None},
        {"temperature": 2, "n": 3},
        {"temperature": 1.5, "top_p": 0.8, "frequency_penalty": 1},
        {"temperature": 1.5, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3},
        {"dsla": {"min_level": 3}},
        {"dsla": {"min_level": 1, "max_level": 2}, "n": 2},
    ],
    ids=str,
)
def test_answers_follow_the_schema(served: Served, fields: dict[str, Any]) -> None:
    for path, body in ((CHAT, CHAT_BODY), (TEXT, TEXT_BODY)):
        found = choices(served, path, body | fields)
        assert len(found) == fields.get("n", 1)
        for text, reason in found:
            assert reason == "stop"
            Animal.model_validate_json(text, strict=True)


def test_several_prompts_have_an_answer_each(served: Served) -> None:
    found = choices(served, TEXT, TEXT_BODY | {"prompt": ["fox", "dog"], "n": 2})
    assert len({text for text, _ in found}) == 4
    for text, reason in found:
        assert reason == "stop"
        Animal.model_validate_json(text)


def test_too_few_tokens_cut_the_same_answer_short(served: Served) -> None:
    ((whole, _),) = choices(served, CHAT, CHAT_BODY)
    for limit in (1, 5, 20):
        ((text, reason),) = choices(served, CHAT, CHAT_BODY | {"max_tokens": limit})
        assert reason == "length"
        assert whole.startswith(text) and text != whole


def test_any_object(served: Served) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    ending = {str(vocabulary[text]): 20 for text in ('"', "}", "]", "0")}
    body = CHAT_BODY | {"response_format": {"type": "json_object"}, "temperature": 2, "logit_bias": ending}
    found = [choices(served, CHAT, body | {"seed": seed})[0] for seed in range(4)]
    assert {reason for _, reason in found} == {"stop"}
    assert all(isinstance(json.loads(text), dict) for text, _ in found)


def test_text_is_any_text(served: Served) -> None:
    plain = {key: value for key, value in CHAT_BODY.items() if key != "response_format"} | {"max_tokens": 30}
    expected = choices(served, CHAT, plain)
    for form in (None, {"type": "text"}):
        assert choices(served, CHAT, plain | {"response_format": form}) == expected


def test_a_stop_text_still_stops(served: Served) -> None:
    ((whole, _),) = choices(served, CHAT, CHAT_BODY)
    assert choices(served, CHAT, CHAT_BODY | {"stop": '"kind"'}) == [(whole[: whole.index('"kind"')], "stop")]


def test_probabilities_are_those_of_what_was_written(served: Served) -> None:
    answer = served.client.chat.completions.create(**CHAT_BODY, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    written = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert written.decode() == choice.message.content
    assert all(token.logprob <= 0 and math.isfinite(token.logprob) for token in choice.logprobs.content)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter"),
        ({"response_format": "json"}, "response_format", "invalid_type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": ANIMAL["response_format"] | {"type": "text"}},
            "response_format",
            "invalid_value",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
            "invalid_value",
        ),
        (json_schema([]), "response_format.json_schema.schema", "invalid_type"),
        (json_schema({"type": "animal"}), "response_format", "invalid_value"),
        (json_schema({"not": {"type": "string"}}), "response_format", "invalid_value"),
        (json_schema({"type": "array", "uniqueItems": True}), "response_format", "invalid_value"),
        (json_schema({"type": "string", "format": "zip-code"}), "response_format", "invalid_value"),
        (json_schema({"type": "string", "pattern": "(?=x)a"}), "response_format", "invalid_value"),
        (json_schema({"type": "string", "pattern": "("}), "response_format", "invalid_value"),
        (json_schema({"$ref": "https://example.org/schema.json"}), "response_format", "invalid_value"),
        (json_schema({"$ref": "#/$defs/missing"}), "response_format", "invalid_value"),
        (json_schema({"type": "string", "enum": [1]}), "response_format", "invalid_value"),
        (json_schema({"enum": ["x" * MAX_SCHEMA_BYTES]}), "response_format", "invalid_value"),
        (json_schema({"const": "\ud800"}), "response_format", "invalid_value"),
        (json_schema({"x-guidance": {"lenient": True}, "not": {}}), "response_format", "invalid_value"),
        (ANIMAL | {"ignore_eos": True}, "ignore_eos", "invalid_value"),
        (ANIMAL | {"min_tokens": 3}, "min_tokens", "invalid_value"),
    ],
    ids=lambda value: json.dumps(value)[:80] if isinstance(value, dict) else "",
)
def test_refusals_name_the_field(served: Served, fields: dict[str, Any], param: str, code: str) -> None:
    before = served.stats()["event_count"]
    for path, body in ((CHAT, CHAT_BODY), (TEXT, TEXT_BODY)):
        for stream in (False, True):
            content = json.dumps(body | {"max_tokens": 9, "stream": stream} | fields)
            response = served.http.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert (error["param"], error["code"]) == (param, code)
            assert param in error["message"] and len(error["message"]) < 400
    assert served.stats()["event_count"] == before


@pytest.mark.parametrize("depth", [100, 400])
def test_schemas_too_deep_are_refused(served: Served, depth: int) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    response = served.http.post(CHAT, json=CHAT_BODY | json_schema(schema))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


RUNAWAY = {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(1, 40)]}
"""The time to compile it doubles with each pattern."""


def test_a_schema_that_would_be_compiled_for_ever_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema_check, "SECONDS", 1.0)
    response = served.http.post(CHAT, json=CHAT_BODY | json_schema(RUNAWAY))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert "too long" in response.json()["error"]["message"] or "too much memory" in response.json()["error"]["message"]


def test_a_schema_above_the_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    schemas = schemas_of(tiny_tokenizer(), tiny_decoder().vocab_size, {2})
    monkeypatch.setattr(schema_check, "MAX_SYMBOLS", 10)
    with pytest.raises(ApiError, match="cannot be followed"):
        constraint_of(schemas, Animal.model_json_schema())


def test_a_model_that_never_ends_has_no_schemas() -> None:
    with pytest.raises(ApiError, match="no token that ends") as error:
        constraint_of(schemas_of(tiny_tokenizer(), tiny_decoder().vocab_size, set()), {})
    assert error.value.param == "response_format"


class Compiler:
    """Holds back the compiling of schemas until it is let go; knows how many were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, compile_ = 0, threading.Event(), JsonSchemas._compile

        def slow(schemas: JsonSchemas, text: str) -> Any:
            self.begun += 1
            assert self.go.wait(20)
            return compile_(schemas, text)

        monkeypatch.setattr(JsonSchemas, "_compile", slow)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    compiler = Compiler(monkeypatch)
    yield compiler
    compiler.go.set()


def numbered(number: int) -> dict[str, Any]:
    return {"const": number}


def body_of(schema: dict[str, Any]) -> dict[str, Any]:
    return TEXT_BODY | json_schema(schema)


@pytest.mark.anyio
async def test_others_are_answered_while_a_schema_is_compiled(compiler: Compiler) -> None:
    async with app_of() as (_, http):
        compiler.go.set()
        assert (await http.post(TEXT, json=body_of(numbered(1)))).status_code == 200
        assert (await http.post(TEXT, json=body_of({"type": "animal"}))).status_code == 400
        compiler.go.clear()
        waiting = asyncio.create_task(http.post(TEXT, json=TEXT_BODY))
        await until(lambda: compiler.begun == 3)
        for body, status in (
            ({"model": MODEL, "prompt": "fox", "max_tokens": 2}, 200),
            (body_of(numbered(1)), 200),
            (body_of({"type": "animal"}), 400),
            (body_of({"enum": ["x" * MAX_SCHEMA_BYTES]}), 400),
        ):
            assert (await http.post(TEXT, json=body)).status_code == status
        assert (compiler.begun, waiting.done()) == (3, False)
        compiler.go.set()
        Animal.model_validate_json((await waiting).json()["choices"][0]["text"])


@pytest.mark.anyio
async def test_too_many_schemas_at_once_are_a_429(compiler: Compiler) -> None:
    async with app_of() as (_, http):
        posts = [asyncio.create_task(http.post(TEXT, json=body_of(numbered(i)))) for i in range(MAX_WAITING + 3)]
        await until(lambda: sum(post.done() for post in posts) == 3)
        refused = await http.post(TEXT, json=body_of(numbered(99)) | {"stream": True})
        assert error(refused) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        compiler.go.set()
        answers = await asyncio.gather(*posts)
        assert sorted(answer.status_code for answer in answers) == [200] * MAX_WAITING + [429] * 3
        assert (await http.post(TEXT, json=body_of(numbered(99)))).status_code == 200


@pytest.mark.anyio
async def test_a_schema_that_many_ask_for_at_once_is_compiled_once(compiler: Compiler) -> None:
    async with app_of() as (_, http):
        posts = [asyncio.create_task(http.post(TEXT, json=TEXT_BODY)) for _ in range(MAX_WAITING + 3)]
        await until(lambda: compiler.begun == 1)
        await asyncio.sleep(0.1)
        posts[0].cancel()
        compiler.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*posts[1:])} == {200}
        assert compiler.begun == 1


@pytest.mark.anyio
async def test_a_schema_waits_no_longer_than_its_request_may_take(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "problem", lambda schema: "")  # takes longer than these requests may
    async with app_of(request_seconds=0.5) as (_, http):
        posts = [http.post(TEXT, json=body_of(numbered(i))) for i in range(MAX_WAITING)]
        for answer in await asyncio.gather(*posts):
            assert error(answer) == (504, "timeout")
        compiler.go.set()
        await until(lambda: compiler.begun == 1)
        assert (await http.post(TEXT, json=body_of(numbered(99)))).status_code == 200
        assert compiler.begun == 2, "those that had gone were not compiled"


def test_a_client_that_leaves_takes_its_schema_from_the_queue(served: Served, compiler: Compiler) -> None:
    for number in range(MAX_WAITING + 3):
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{served.address}{TEXT}", json=body_of(numbered(number)), timeout=0.2)
            pytest.fail("it was answered")
    compiler.go.set()
    answer = served.http.post(TEXT, json=body_of(numbered(99)))
    assert answer.status_code == 200, answer.text
    assert compiler.begun == 2


def test_a_refused_schema_is_compiled_again_only_later(monkeypatch: pytest.MonkeyPatch) -> None:
    schemas, tried = schemas_of(tiny_tokenizer(), tiny_decoder().vocab_size, {2}), list[str]()

    def problem(schema: str) -> str:
        tried.append(schema)
        return "it takes too long to compile"

    monkeypatch.setattr(structured, "problem", problem)
    for _ in range(3):
        with pytest.raises(ApiError, match="takes too long"):
            constraint_of(schemas, numbered(1))
    assert len(tried) == 1
    with pytest.raises(ApiError, match="takes too long"):
        constraint_of(schemas, numbered(2))
    assert len(tried) == 2
    later = time.monotonic() + structured.REFUSED_SECONDS
    monkeypatch.setattr(structured, "problem", lambda schema: "")
    monkeypatch.setattr(structured, "time", SimpleNamespace(monotonic=lambda: later))
    assert constraint_of(schemas, numbered(1)) is not None


def test_a_schema_too_deep_to_be_written_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    with pytest.raises(ApiError, match="nested too deep"):
        constraint_of(schemas_of(tiny_tokenizer(), tiny_decoder().vocab_size, {2}), schema)


@pytest.mark.anyio
async def test_a_server_without_llguidance_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "find_spec", lambda name: None)
    async with app_of() as (_, http):
        refused = await http.post(TEXT, json=TEXT_BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
        assert "llguidance" in refused.json()["error"]["message"]


def schemas_of(tokenizer: PreTrainedTokenizerFast, vocab_size: int, ends: set[int]) -> JsonSchemas:
    return JsonSchemas(tokenizer, TokenBytes.of(tokenizer), vocab_size, ends)


def constraint_of(schemas: JsonSchemas, schema: dict[str, Any]) -> Any:
    return asyncio.run(schemas.constraint(schema))


@pytest.mark.parametrize("park_bytes", [0, 1 << 30], ids=["replayed", "parked"])
def test_a_preempted_answer_is_the_same(park_bytes: int) -> None:
    vocab_size = tiny_decoder().vocab_size
    constraint = constraint_of(schemas_of(tiny_tokenizer(), vocab_size, {2}), Animal.model_json_schema())
    params = SamplingParams(max_tokens=400, temperature=1.5, seed=3, constraint=constraint)

    def answer(places: list[int]) -> list[int]:
        decoder = tiny_decoder()
        config = EngineConfig(park_bytes=park_bytes, cache_bytes=0, level=1)
        engine = Engine(decoder, decoder.arena(8 << 20), config)
        engine.add_request([5, 6, 7], params, request_id="r")
        tokens: list[int] = []
        while engine.has_work:
            for output in engine.step():
                tokens += output.tokens
            if places and len(tokens) == places[0]:
                places.pop(0)
                engine._preempt(engine._requests["r"], 0.0)
        assert places == []
        return tokens

    expected = answer([])
    assert answer([1, 7, 20]) == expected
    Animal.model_validate_json(Detokenizer(TokenBytes.of(tiny_tokenizer())).add(expected))


TOKENIZERS = {
    "byte-level": (schemas_of(tiny_tokenizer(), 400, {2, 399}), {2, 399}),
    "byte-fallback": (schemas_of(fallback_tokenizer(), 300, {0, 290}), {0, 290}),
}

LEAVES: list[tuple[dict[str, Any], Any]] = [
    ({"type": "integer", "minimum": -5, "maximum": 120}, lambda x: type(x) is int and -5 <= x <= 120),
    ({"type": "boolean"}, lambda x: type(x) is bool),
    ({"type": "null"}, lambda x: x is None),
    ({"type": "string", "maxLength": 5}, lambda x: isinstance(x, str) and len(x) <= 5),
    (
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        lambda x: isinstance(x, str) and set(x) <= set("abc") and 2 <= len(x) <= 4,
    ),
    ({"enum": ["one", 2, None, "🦆é"]}, lambda x: x in ["one", 2, None, "🦆é"]),
    ({"const": 'مرحبا\n"漢字"'}, lambda x: x == 'مرحبا\n"漢字"'),
]
"""Schemas, and whether a value is one of theirs."""


def grown(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def array(item: tuple[dict[str, Any], Any]) -> tuple[dict[str, Any], Any]:
        schema = {"type": "array", "items": item[0], "minItems": 1, "maxItems": 3}
        return schema, lambda x: isinstance(x, list) and 1 <= len(x) <= 3 and all(map(item[1], x))

    def either(options: list[tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], Any]:
        return {"anyOf": [schema for schema, _ in options]}, lambda x: any(check(x) for _, check in options)

    def record(fields: dict[str, tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], Any]:
        properties = {name: schema for name, (schema, _) in fields.items()}
        schema = {"type": "object", "properties": properties, "required": list(fields), "additionalProperties": False}
        return (
            schema,
            lambda x: (
                isinstance(x, dict) and set(x) == set(fields) and all(fields[name][1](x[name]) for name in fields)
            ),
        )

    names = st.sampled_from(["a", "long name", "é🦆", 'quo"te'])
    return st.one_of(
        children.map(array),
        st.lists(children, min_size=1, max_size=3).map(either),
        st.dictionaries(names, children, min_size=1, max_size=3).map(record),
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(st.recursive(st.sampled_from(LEAVES), grown, max_leaves=6), st.integers(0, 2**32))
def test_whatever_is_drawn_is_json_of_the_schema(name: str, pair: tuple[dict[str, Any], Any], seed: int) -> None:
    (schemas, ends), (schema, check), draws = TOKENIZERS[name], pair, np.random.default_rng(seed)
    constraint, output, table = constraint_of(schemas, schema)(), list[int](), schemas._table
    while (token := int(draws.choice(np.flatnonzero(constraint.allowed(output))))) not in ends:
        assert table[token], "it allows a token that no text has"
        output.append(token)
        assert len(output) < 5000
    text = b"".join(table[token] for token in output).decode()
    assert check(json.loads(text)), text
