"""Single keys from a terminal."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import Self


class Keys:
    """Keys as they are pressed, without Enter; none where stdin is no terminal."""

    def __enter__(self) -> Self:
        self._terminal = sys.stdin.isatty()
        if self._terminal:
            import termios
            import tty

            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, *error: object) -> None:
        if self._terminal:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def wait(self, seconds: float) -> str | None:
        """The key pressed within so many seconds; None where none was."""
        if not self._terminal:
            time.sleep(seconds)
            return None
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else None
