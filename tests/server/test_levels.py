"""The fields under `dsla`, and the admin API."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import MODEL, Served

BODY: dict[str, Any] = {
    "model": MODEL,
    "prompt": "the quick brown fox",
    "max_tokens": 10,
    "temperature": 0,
    "ignore_eos": True,
}


def answer(served: Served, **fields: Any) -> dict[str, Any]:
    response = served.http.post("/v1/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({}, 2),
        ({"quality": "full"}, 0),
        ({"quality": "balanced"}, 1),
        ({"quality": "fast"}, 2),
        ({"max_level": 1}, 1),
        ({"min_level": 3}, 3),
        ({"min_level": 1, "max_level": 1}, 1),
    ],
    ids=str,
)
def test_level_set_by_hand_within_the_bounds_of_the_request(
    served: Served, options: dict[str, Any], level: int
) -> None:
    response = served.http.post("/admin/level", json={"level": 2})
    assert response.status_code == 200
    assert answer(served, dsla=options)["dsla"]["levels"] == [[0, level]]


def test_state_tells_the_level_and_null_gives_it_back(served: Served) -> None:
    assert served.http.post("/admin/level", json={"level": 3}).json()["model"] == MODEL
    answer(served)
    assert served.stats()["level"] == 3
    served.http.post("/admin/level", json={"level": None}).raise_for_status()
    assert answer(served)["dsla"]["levels"] == [[0, 0]]
    assert served.stats()["level"] is None


def test_level_rises_while_a_stream_runs(served: Served) -> None:
    stream = served.client.completions.create(
        model=MODEL, prompt="the quick brown fox", max_tokens=400, stream=True, temperature=0,
        extra_body={"ignore_eos": True, "dsla": {"max_level": 2}},
    )  # fmt: skip
    next(iter(stream))
    served.http.post("/admin/level", json={"level": 3}).raise_for_status()
    last = list(stream)[-1]
    assert last.model_extra is not None
    levels = last.model_extra["dsla"]["levels"]
    assert [level for _, level in levels] == [0, 2]
    assert last.model_extra["dsla"]["folded_tokens"] == 2 * levels[1][0]


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_every_chunk_of_a_stream_tells_the_levels_so_far(served: Served, chat: bool) -> None:
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 400, "stream": True, "temperature": 0}
    fields["extra_body"] = {"ignore_eos": True, "dsla": {"stream_levels": True, "max_level": 2}}
    seen = []
    if chat:
        stream = served.client.chat.completions.create(messages=[{"role": "user", "content": "lazy dog"}], **fields)
    else:
        stream = served.client.completions.create(prompt="the lazy dog", **fields)
    for chunk in stream:
        choice = chunk.choices[0]
        if choice.delta.content if chat else choice.text:
            seen.append(chunk.model_extra["dsla"]["levels"][-1][1])
        if len(seen) == 1:
            served.http.post("/admin/level", json={"level": 3}).raise_for_status()
    assert (seen[0], seen[-1]) == (0, 2)
    assert seen == sorted(seen)


@pytest.mark.parametrize("level", [4, -1])
def test_level_out_of_range(served: Served, level: int) -> None:
    response = served.http.post("/admin/level", json={"level": level})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "level"


@pytest.mark.parametrize("body", [{}, {"level": "1"}, {"level": 1, "x": 1}, {"level": 1.0}, {"level": True}], ids=str)
def test_admin_bodies_are_checked(served: Served, body: dict[str, Any]) -> None:
    assert served.http.post("/admin/level", json=body).status_code == 400
