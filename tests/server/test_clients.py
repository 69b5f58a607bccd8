"""Programs that people put before the server, unchanged: the official client, LangChain, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.conftest import MODEL, Served
from tests.server.test_openai import MESSAGES


class River(BaseModel):
    """A river."""

    name: Literal["Po", "Rhône", "黄河"]
    length: int = Field(ge=0, le=9999, description="km")
    mouth: str = Field(max_length=5)


COMMON: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 300, "seed": 4}

structured = pytest.mark.skipif(
    find_spec("llguidance") is None,
    reason="needs llguidance, which the extra `serve` installs",
)


@structured
def test_the_official_client_parses_answers(served: Served) -> None:
    answer = served.client.chat.completions.parse(response_format=River, n=2, **COMMON)
    rivers = [choice.message.parsed for choice in answer.choices]
    assert [type(river) for river in rivers] == [River, River]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert json.loads(answer.choices[0].message.content or "") == json.loads(rivers[0].model_dump_json())  # type: ignore[union-attr]
    with pytest.raises(openai.LengthFinishReasonError):
        served.client.chat.completions.parse(response_format=River, **COMMON | {"max_tokens": 3})


@structured
def test_the_official_client_parses_streams(served: Served) -> None:
    with served.client.chat.completions.stream(response_format=River, **COMMON) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert len(deltas) > 3
    assert "".join(deltas) == answer.choices[0].message.content
    assert (
        answer.choices[0].message.parsed
        == served.client.chat.completions.parse(response_format=River, **COMMON).choices[0].message.parsed
    )


@structured
def test_the_official_client_hears_what_is_wrong_with_a_schema(served: Served) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "format": "zip"}}}
    with pytest.raises(openai.BadRequestError, match="Unknown format") as error:
        served.client.chat.completions.create(response_format=form, **COMMON)
    assert error.value.param == "response_format"


def chain(served: Served, **fields: Any) -> Any:
    """LangChain's model of the server."""
    reason = "needs langchain-openai, which the extra `clients` installs"
    langchain_openai = pytest.importorskip("langchain_openai", reason=reason)
    settings = {"temperature": 1, "seed": 4, "max_tokens": 300, "max_retries": 0} | fields
    return langchain_openai.ChatOpenAI(model=MODEL, base_url=f"{served.address}/v1", api_key="none", **settings)


def test_langchain_invokes_and_streams(served: Served) -> None:
    model = chain(served, max_tokens=40)
    answer = model.invoke([("system", "be brief"), ("human", "the quick brown 🦆")])
    assert answer.content and answer.usage_metadata["output_tokens"] <= 40
    chunks = list(model.stream([("system", "be brief"), ("human", "the quick brown 🦆")]))
    assert len(chunks) > 3
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert model.batch(["fox", "dog"])[0].content == model.invoke("fox").content


@structured
def test_langchain_has_structured_output(served: Served) -> None:
    model = chain(served)
    for strict in (None, True):
        answer = model.with_structured_output(River, method="json_schema", strict=strict).invoke("a river")
        assert isinstance(answer, River)
    (*_, last) = model.with_structured_output(River, method="json_schema").stream("a river")
    assert last == model.with_structured_output(River, method="json_schema").invoke("a river")
    schema = {"title": "river", "description": "A river.", **River.model_json_schema()}
    found = model.with_structured_output(schema, method="json_schema", include_raw=True).invoke("a river")
    assert found["parsing_error"] is None
    River.model_validate(found["parsed"])


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    return subprocess.run(
        ["curl", "-sS", "--max-time", "20", *arguments], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout


def posted(body: dict[str, Any]) -> tuple[str, ...]:
    return ("-H", "Content-Type: application/json", "-d", json.dumps(body, ensure_ascii=False))


def test_curl(served: Served) -> None:
    assert json.loads(curl(f"{served.address}/v1/models"))["data"][0]["id"] == MODEL
    url, body = f"{served.address}/v1/chat/completions", {**COMMON, "max_tokens": 30}
    text = json.loads(curl(url, *posted(body)))["choices"][0]["message"]["content"]
    lines = [line for line in curl("-N", url, *posted(body | {"stream": True})).split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    status = curl("-o", "/dev/null", "-w", "%{http_code}", url, *posted(body | {"model": "gpt-5"}))
    assert status == "404"


@structured
def test_curl_with_a_schema(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "river", "schema": River.model_json_schema()}}
    answer = json.loads(curl(f"{served.address}/v1/chat/completions", *posted(COMMON | {"response_format": form})))
    River.model_validate_json(answer["choices"][0]["message"]["content"])
