"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from dsla.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}
_SPELLINGS = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_bytes(text: str, name: str, least: int = 1) -> int:
    """Bytes of a size such as `512MiB`, `1.5GB` or `4096`.

    Args:
        text: number and unit: B, KB (1000), KiB or K (1024), and so on to T.
        name: what is given, for messages.
        least: bytes, at least.

    Raises:
        ConfigError: not a size, or a smaller one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _SPELLINGS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * factor) if match and factor else -1
    if size < least:
        raise ConfigError(f"{name}: expected a size such as 512MiB or 2GiB, found {text!r}")
    return size


def format_bytes(size: int) -> str:
    """A size in the largest binary unit that keeps it above one, as `1.5 GiB`."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
