"""Lines of the log: their form, and what they leave out below the level `debug`."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from dsla.errors import EngineError
from dsla.server.detokenize import Detokenizer
from dsla.server.logs import FORMATS, logging_to

logger = logging.getLogger("dsla.tests")


def written(form: str, level: str, error: BaseException | None = None, **fields: Any) -> str:
    stream = io.StringIO()
    with logging_to(stream, form, level):
        logger.debug("for debugging")
        logger.error("a %s\nfailed", "thing", exc_info=error, extra={"fields": fields})
        logging.getLogger("somebody.else").info("chatter")
        logging.getLogger("somebody.else").warning("careful")
    logger.error("after the end")
    return stream.getvalue()


def raised(error: Exception) -> Exception:
    """An error that has passed through this package."""

    class Table:
        def __getitem__(self, token: int) -> bytes:
            raise error

    try:
        Detokenizer(Table()).add([1])  # type: ignore[arg-type]
    except type(error) as caught:
        return caught
    raise AssertionError


def test_json_lines_hold_an_object_each() -> None:
    lines = [json.loads(text) for text in written("json", "info", status=200, path="é").splitlines()]
    assert [line["message"] for line in lines] == ["a thing\nfailed", "careful"]
    first = lines[0]
    assert first.pop("time").endswith("Z")
    assert first == {"level": "error", "logger": "dsla.tests", "message": "a thing\nfailed", "status": 200, "path": "é"}


def test_text_lines_are_one_line_each() -> None:
    lines = written("text", "info").splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("ERROR   a thing failed")
    assert lines[1].endswith("WARNING careful")


@pytest.mark.parametrize("form", FORMATS)
def test_an_error_is_its_type_and_place_and_no_more(form: str) -> None:
    text = written(form, "info", raised(ValueError("secret in /etc/passwd")))
    assert "ValueError" in text and "dsla.server.detokenize:" in text
    assert "secret" not in text and "Traceback" not in text and ".py" not in text


@pytest.mark.parametrize("form", FORMATS)
def test_errors_of_this_package_say_why(form: str) -> None:
    assert "the sky fell" in written(form, "info", raised(EngineError("the sky fell")))


@pytest.mark.parametrize("form", FORMATS)
def test_for_debugging_there_is_everything(form: str) -> None:
    text = written(form, "debug", raised(ValueError("secret")))
    assert "for debugging" in text and "Traceback" in text and "secret" in text
    assert "chatter" not in text


def test_the_level_holds_those_behind_it() -> None:
    assert "careful" not in written("text", "error")
    stream = io.StringIO()
    with logging_to(stream, "text", "error"):
        logger.warning("not this")
        logger.error("this")
    assert "not this" not in stream.getvalue() and "this" in stream.getvalue()
