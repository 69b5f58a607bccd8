"""Stop strings over streamed text: found across token boundaries, no part of one ever sent."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a stream of text before the first stop string that is completed in it.

    The text let through does not depend on how the stream is cut into pieces. Of two stop strings the one that ends
    first counts; of two that end at the same character, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """
        Args:
            stops: stop strings, none empty.
        """
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Takes further text.

        Args:
            text: str, may be empty.

        Returns:
            the text that may be sent now, and whether a stop string was completed (then nothing may follow).
        """
        text = self._held + text
        if not self._stops:
            return text, False
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = len(text) - self._open_length(text)
        self._held = text[kept:]
        return text[:kept], False

    def finish(self) -> str:
        """The text held back because it could have become a stop string; the stream ended without one."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
