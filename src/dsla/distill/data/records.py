"""Documents out of files: plain text as it is, conversations through the tokenizer's chat template."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsla.distill.data.files import kind_of, open_text, text_files
from dsla.errors import DataError

_ROWS_AT_ONCE = 256
_KEYS = ("text", "messages")


def read_documents(paths: Sequence[Path], tokenizer: Any = None) -> Iterator[str]:
    """Texts of `.txt` (a file is a document), `.jsonl` (a line is one) and `.parquet` (a row is one) files.

    A record has a `text`, taken as it is, or `messages`, a list of `{role, content}`, which go through the tokenizer's chat
    template. Of a record with both, the messages count if there is a template.

    Args:
        paths: as for `text_files`.
        tokenizer: the Hugging Face tokenizer whose chat template is used; without one, records need a `text`.

    Raises:
        DataError: as `text_files`; if a file is damaged or binary; if a record, named by file and line or row, has neither key,
            a value of the wrong type, or messages alone where there is no chat template.
    """
    for path in text_files(paths):
        kind = kind_of(path)
        try:
            if kind == ".parquet":
                yield from _parquet(path, tokenizer)
                continue
            with open_text(path) as file:
                if kind == ".txt":
                    yield _not_binary(file.read(), path)
                    continue
                for number, line in enumerate(file, 1):
                    if _not_binary(line, path).strip():
                        where = f"{path}, line {number}"
                        yield _document(_json(line, where), where, tokenizer)
        except UnicodeDecodeError:
            raise DataError(f"{path} is binary or not UTF-8 text") from None
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"cannot read {path}: {error}") from None


def _parquet(path: Path, tokenizer: Any) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'dsla[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            columns = [name for name in _KEYS if name in file.schema_arrow.names]
            if not columns:
                found = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: expected a column 'text' or 'messages', found {found or 'none'}")
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, f"{path}, row {number}", tokenizer)
    except ArrowException as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _not_binary(text: str, path: Path) -> str:
    if "\0" in text:
        raise DataError(f"{path} is binary or not UTF-8 text: it holds zero bytes")
    return text


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None


def _document(record: Any, where: str, tokenizer: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    messages = record.get("messages") if isinstance(record, dict) else None
    template = getattr(tokenizer, "chat_template", None)
    if messages is not None and (template or text is None):
        if not template:
            owner = "the tokenizer has no chat template" if tokenizer else "there is no tokenizer here"
            raise DataError(f"{where}: 'messages' need a chat template and {owner}: give records with a 'text'")
        text = _conversation(messages, where, tokenizer)
    if not isinstance(text, str):
        raise DataError(f"{where}: expected an object with a string under 'text' or a list under 'messages'")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the text holds half a surrogate pair") from None
    return text


def _conversation(messages: Any, where: str, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of {{role, content}} under 'messages', found {_found(messages)}")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {place} must be {{role, content}}, found {_found(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _found(message.get(key))
                raise DataError(f"{where}: message {place} needs a string under {key!r}, found {found}")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses the messages: {error}") from None


def _found(value: Any) -> str:
    return "nothing" if value is None or value == [] else type(value).__name__
