"""Sizes in bytes, read and written."""

from __future__ import annotations

import pytest

from dsla.cli.sizes import format_bytes, parse_bytes
from dsla.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("512MiB", 512 << 20),
        ("2g", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("1kb", 1000),
        ("2GB", 2 * 10**9),
        ("1T", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "0", "-5", "MiB", "1XB", "1 2", "1e9", "0.1B", "nan"])
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory: expected a size such as 512MiB"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_bytes(size) == text
