"""What `dsla chat` knows beside the answers: turns, levels asked for, and the commands that change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dsla.errors import ConfigError

Turn = dict[str, str]
"""`{"role", "content"}`."""

AUTOMATIC = "auto"
"""What is given in place of a level or a quality to leave it to the engine."""


class Command(NamedTuple):
    """A command of the chat.

    Attributes:
        argument: what follows its name, as `N`; empty = nothing does.
        help: what it does.
        run: does it with the argument; returns what to tell the user.
    """

    argument: str
    help: str
    run: Callable[[Conversation, str], str]


class Conversation:
    """The turns so far, and what the next answer is asked to be.

    Args:
        max_level: highest level of the model; None = whoever answers has no levels.
        system: system message, or None.

    Attributes:
        turns: of user and assistant.
        levels: bounds of the next answer's levels, as a request has them: `quality`, or `min_level` and `max_level`.
        ended: whether the user has asked to leave.
    """

    def __init__(self, max_level: int | None, system: str | None = None) -> None:
        self._max_level, self._system = max_level, system
        self._saved: set[Path] = set()
        self.turns: list[Turn] = []
        self.levels: dict[str, Any] = {}
        self.ended = False

    @property
    def messages(self) -> list[Turn]:
        """All turns, after the system message where there is one."""
        return [*([{"role": "system", "content": self._system}] if self._system else []), *self.turns]

    def command(self, line: str) -> str:
        """Carries out a line that begins with `/`.

        Returns:
            What to tell the user.

        Raises:
            ConfigError: there is no such command, or its argument is wrong.
        """
        name, _, argument = line.removeprefix("/").partition(" ")
        if name not in COMMANDS:
            raise ConfigError(f"there is no command /{name}: /help lists them; begin with // to send a text with /")
        command, argument = COMMANDS[name], argument.strip()
        if argument and not command.argument:
            raise ConfigError(f"/{name} takes nothing after it, found {argument!r}")
        return command.run(self, argument)

    def set_level(self, text: str) -> str:
        """Fixes the level of the answers to come, or leaves it to the engine again (`auto`).

        Raises:
            ConfigError: there is no such level.
        """
        top = self._top()
        if text == AUTOMATIC:
            self.levels = {}
        elif text:
            if not text.isdecimal():
                raise ConfigError(f"/level: expected a number in 0 ... {top} or {AUTOMATIC}, found {text!r}")
            if int(text) > top:
                raise ConfigError(f"level {text} is out of range: this model has levels 0 ... {top}")
            self.levels = {"min_level": int(text), "max_level": int(text)}
        return self._asked()

    def set_quality(self, text: str) -> str:
        """Sets the quality of the answers to come, or leaves it to the engine again (`auto`).

        Raises:
            ConfigError: there is no such quality.
        """
        from dsla.engine import QUALITY

        self._top()
        if text == AUTOMATIC:
            self.levels = {}
        elif text:
            if text not in QUALITY:
                raise ConfigError(f"/quality: expected {', '.join(QUALITY)} or {AUTOMATIC}, found {text!r}")
            self.levels = {"quality": text}
        return self._asked()

    def set_system(self, text: str) -> str:
        """Sets the system message, or takes it away; the turns stay."""
        self._system = text or None
        return "The system message is set." if text else "There is no system message."

    def clear(self) -> str:
        """Forgets all turns; the system message stays."""
        self.turns = []
        return "A new conversation begins."

    def save(self, name: str) -> str:
        """Writes the conversation as a line of JSON, as training data has it.

        Raises:
            ConfigError: there is no name or nothing to write, the file is there already, or it cannot be written.
        """
        if not name:
            raise ConfigError("/save: name a file")
        path = Path(name).expanduser()
        if not self.turns:
            raise ConfigError(f"there is nothing to save in {path} yet")
        if path.exists() and path.resolve() not in self._saved:
            raise ConfigError(f"{path} is there already: choose another name")
        try:
            path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
        self._saved.add(path.resolve())
        return f"Wrote {len(self.turns)} messages to {path}."

    def leave(self) -> str:
        """Ends the chat."""
        self.ended = True
        return ""

    def _top(self) -> int:
        if self._max_level is None:
            raise ConfigError("this server has no levels: /level and /quality are for those of `dsla serve`")
        return self._max_level

    def _asked(self) -> str:
        if "quality" in self.levels:
            return f"Quality {self.levels['quality']}."
        if "min_level" in self.levels:
            return f"Level {self.levels['min_level']} of 0 ... {self._max_level}."
        return f"Level 0 ... {self._max_level}, as the engine chooses."


def _help() -> str:
    rows = [(f"/{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    keys = ("Ctrl-C", "stop the answer; twice: leave, as Ctrl-D does")
    return "\n".join(f"  {usage:<{width}}  {text}" for usage, text in [*rows, keys])


COMMANDS = {
    "level": Command("N", f"answer at level N from now on; {AUTOMATIC}: as the engine chooses", Conversation.set_level),
    "quality": Command("NAME", f"full, balanced or fast: levels allowed; {AUTOMATIC}: all", Conversation.set_quality),
    "system": Command("TEXT", "set the system message; without TEXT: have none", Conversation.set_system),
    "clear": Command("", "begin a new conversation", lambda chat, _: chat.clear()),
    "save": Command("FILE", "write the conversation to a .jsonl file", Conversation.save),
    "help": Command("", "show this", lambda chat, _: _help()),
    "quit": Command("", "leave", lambda chat, _: chat.leave()),
}
"""Name -> command."""
