"""Stop strings do not depend on how the text is cut, and no part of one is sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsla.server.stop import StopStrings


def reference(text: str, stops: list[str]) -> str:
    """Character by character: the first stop string completed ends the text."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


def streamed(pieces: list[str], stops: list[str]) -> str:
    matcher, sent = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = matcher.add(piece)
        sent += text
        if stopped:
            return sent
    return sent + matcher.finish()


@given(
    st.lists(st.text(alphabet="abc", max_size=5), max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_any_cut_equals_character_by_character(pieces: list[str], stops: list[str]) -> None:
    assert streamed(pieces, stops) == reference("".join(pieces), stops)


def test_holds_back_what_could_become_a_stop() -> None:
    matcher = StopStrings(["<end>"])
    assert matcher.add("text <e") == ("text ", False)
    assert matcher.add("xtra <") == ("<extra ", False)
    assert matcher.add("en") == ("", False)
    assert matcher.add("d> hidden") == ("", True)


def test_held_text_is_sent_when_no_stop_came() -> None:
    matcher = StopStrings(["<end>"])
    assert matcher.add("a <en") == ("a ", False)
    assert matcher.finish() == "<en"


def test_without_stops_nothing_is_held() -> None:
    assert StopStrings(()).add("x") == ("x", False)
