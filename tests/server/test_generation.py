"""From the engine's outputs to pieces of text, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from dsla.engine import StepOutput
from dsla.errors import EngineError
from dsla.server.detokenize import TokenBytes
from dsla.server.errors import ApiError
from dsla.server.generation import Piece, merged, text_pieces

TABLE = TokenBytes([b"ab", b"c", b"\xc3", b"\xa9", b"<", b"end>"])


class Outputs:
    """A request's outputs, given in advance, that know whether they were stopped or closed."""

    def __init__(
        self, groups: Sequence[Sequence[int]], reason: str | None = "length", error: Exception | None = None
    ) -> None:
        self.groups, self.reason, self.error, self.ends = groups, reason, error, list[str]()

    def __aiter__(self) -> AsyncGenerator[StepOutput, None]:
        return self._stream()

    def stop(self) -> None:
        self.ends.append("stopped")

    async def aclose(self) -> None:
        self.ends.append("closed")

    async def _stream(self) -> AsyncGenerator[StepOutput, None]:
        count = 0
        for place, group in enumerate(self.groups):
            count += len(group)
            last = place == len(self.groups) - 1 and self.error is None
            reports = tuple(((token, -float(token)),) for token in group)
            reason = self.reason if last else None
            yield StepOutput("r", list(group), reason, None, 7, count, [[0, 1]], 5, 3, reports)
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


def pieces(outputs: Outputs, stops: Sequence[str] = ()) -> list[Piece]:
    async def collect() -> list[Piece]:
        try:
            return [piece async for piece in text_pieces(outputs, TABLE, stops)]
        finally:
            # At once, not whenever the garbage collector finds the generator.
            assert outputs.ends[-1] == "closed"

    return asyncio.run(collect())


def test_text_comes_when_characters_are_complete() -> None:
    found = pieces(Outputs([[0], [2], [3, 1], []]))
    assert [(piece.text, piece.finish_reason, piece.completion_tokens) for piece in found] == [
        ("ab", None, 1),
        ("éc", None, 4),
        ("", "length", 4),
    ]
    assert (found[-1].prompt_tokens, found[-1].cached_tokens) == (7, 3)
    assert found[-1].dsla.model_dump() == {"levels": [[0, 1]], "folded_tokens": 5}


def reported(found: list[Piece]) -> list[list[tuple[int, int]]]:
    """Offsets and tokens of each piece's reports."""
    return [[(report.offset, report.logprobs[0][0]) for report in piece.reports] for piece in found]


@pytest.mark.parametrize("groups", [[[0], [2], [3, 1], [4], [1]], [[0, 2, 3, 1, 4, 1]]], ids=["single", "together"])
def test_a_token_is_reported_when_its_text_begins_to_be_sent(groups: list[list[int]]) -> None:
    every = [(0, 0), (2, 2), (2, 3), (3, 1), (4, 4), (5, 1)]
    found = pieces(Outputs(groups), ["<end>"])
    assert [entry for piece in reported(found) for entry in piece] == every
    assert len(groups) == 1 or reported(found) == [every[:1], every[1:4], every[4:]]


def test_a_token_after_a_broken_character_begins_behind_it() -> None:
    assert reported(pieces(Outputs([[2], [1], [2], [3]]))) == [[(0, 2), (1, 1)], [(2, 2), (2, 3)]]


def test_tokens_of_a_stop_text_are_not_reported() -> None:
    assert reported(pieces(Outputs([[0], [1], [4], [5]]), ["c<end>"])) == [[(0, 0)], []]
    assert reported(pieces(Outputs([[0], [1], [4], [5]]), ["bc<end>"])) == [[(0, 0)], []]
    assert reported(pieces(Outputs([[0, 1, 4, 5]]), ["end"])) == [[(0, 0), (2, 1), (3, 4)]]


def test_tokens_without_text_at_the_end_are_reported() -> None:
    assert reported(pieces(Outputs([[0], [99], [99]]))) == [[(0, 0)], [(2, 99), (2, 99)]]


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    assert [piece.text for piece in pieces(Outputs([[0], [2]]))] == ["ab", "\ufffd"]


@pytest.mark.parametrize("groups", [[[0], [4], [5], [1]], [[0, 4, 5, 1]], [[0, 4], [5, 1]]], ids=str)
def test_a_stop_text_ends_the_request_and_counts_the_tokens_up_to_it(groups: list[list[int]]) -> None:
    outputs = Outputs(groups)
    found = pieces(outputs, ["<end>"])
    assert "".join(piece.text for piece in found) == "ab"
    assert (found[-1].finish_reason, found[-1].completion_tokens) == ("stop", 3)
    assert outputs.ends == ["stopped", "closed"]


def test_a_stop_text_ends_the_request_before_its_last_piece_is_read() -> None:
    async def read() -> list[str]:
        outputs = Outputs([[0], [1]])
        async with aclosing(text_pieces(outputs, TABLE, ["c"])) as found:
            assert (await anext(found)).text == "ab"
            assert outputs.ends == []
            assert (await anext(found)).finish_reason == "stop"
            return list(outputs.ends)

    assert asyncio.run(read()) == ["stopped"]


def test_the_beginning_of_a_stop_text_is_sent_at_the_end() -> None:
    found = pieces(Outputs([[0], [4]], reason="stop"), ["<end>"])
    assert [(piece.text, piece.finish_reason) for piece in found] == [("ab", None), ("<", "stop")]


@pytest.mark.parametrize(
    ("outputs", "status"),
    [
        (Outputs([[0]], reason="abort"), 503),
        (Outputs([[0]], reason="error"), 500),
        (Outputs([[0]], error=EngineError("inside")), 503),
        (Outputs([[0]], reason=None), 500),
    ],
    ids=["abort", "error", "stopped", "cut off"],
)
def test_failures(outputs: Outputs, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        pieces(outputs)
    assert caught.value.status == status
    assert "inside" not in caught.value.message


async def numbers(count: int, closed: list[int], fail: bool = False) -> AsyncGenerator[int, None]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield number
        if fail:
            raise ValueError("broken")
    finally:
        closed.append(count)


def test_merged_gives_everything_in_order_of_each_stream() -> None:
    async def collect() -> list[tuple[int, int]]:
        return [item async for item in merged([numbers(2, closed), numbers(0, closed), numbers(3, closed)])]

    closed: list[int] = []
    found = asyncio.run(collect())
    assert sorted(found) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert [number for index, number in found if index == 2] == [0, 1, 2]
    assert sorted(closed) == [0, 2, 3]


@pytest.mark.parametrize("slow", [False, True])
def test_merged_takes_no_more_than_its_reader_and_from_all_alike(slow: bool) -> None:
    async def read() -> tuple[int, list[int]]:
        given = 0

        async def counting() -> AsyncGenerator[int, None]:
            nonlocal given
            while True:
                given += 1
                yield given

        found = []
        async with aclosing(merged([counting(), counting(), counting()])) as stream:
            for _ in range(12):
                found.append((await anext(stream))[0])
                for _ in range(20 * slow):
                    await asyncio.sleep(0)
        return given, found

    given, found = asyncio.run(read())
    assert 12 <= given <= 12 + 2 * 3
    assert found == [0, 1, 2] * 4


def test_merged_closes_all_when_one_fails() -> None:
    async def collect() -> None:
        async for _ in merged([numbers(10**6, closed), numbers(2, closed, fail=True)]):
            pass

    closed: list[int] = []
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect())
    assert sorted(closed) == [2, 10**6]


def test_merged_closes_all_when_it_is_closed() -> None:
    async def take_one() -> None:
        stream = merged([numbers(10**6, closed), numbers(10**5, closed)])
        await anext(stream)
        await stream.aclose()
        assert sorted(closed) == [10**5, 10**6]

    closed: list[int] = []
    asyncio.run(take_one())
