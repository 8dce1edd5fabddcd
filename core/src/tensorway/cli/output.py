"""How the command line writes: 80 columns, color only on a terminal, JSON on request.

Room `cli`. The only module that prints.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import IO, Any, Final

import attrs

from tensorway import settings

WIDTH: Final = 80
_BAR: Final = 16
_COLORS: Final = {"good": "32", "bad": "31", "dim": "2", "strong": "1"}


@attrs.frozen
class Output:
    """Where one command writes, and in which form."""

    as_json: bool = False
    debug: bool = False
    stream: IO[str] = attrs.field(factory=lambda: sys.stdout)
    notes: IO[str] = attrs.field(factory=lambda: sys.stderr)

    def line(self, text: str = "") -> None:
        """One line as it is."""
        if not self.as_json:
            print(text, file=self.stream, flush=True)

    def text(self, text: str, indent: int = 0, hang: int = 0) -> None:
        """A paragraph, wrapped and indented; from its second line on by `hang` more."""
        if text:
            self.line("\n".join(wrapped(text, indent, hang)))

    def json(self, schema: str, fields: dict[str, Any]) -> None:
        """The whole answer, as one JSON object."""
        if self.as_json:
            print(json.dumps({"schema": schema, **fields}, indent=2, ensure_ascii=True), file=self.stream, flush=True)

    def progress(self, text: str) -> None:
        """What is being done right now. Beside the answer, not in it, so that `--json` stays one object."""
        print(text, file=self.notes if self.as_json else self.stream, flush=True)

    def live(self, text: str = "", share: float | None = None) -> None:
        """What is being done right now, over what this said before, and which share of all is done.

        Nothing: wipe it. Where it does not go to a terminal, each is a line of its own.
        """
        stream = self.notes if self.as_json else self.stream
        if stream.isatty() and settings.terminal():
            bar = "" if share is None else f"[{'#' * int(share * _BAR):.<{_BAR}}] "
            room = min(WIDTH, shutil.get_terminal_size().columns) - 1  # a full line would wrap, and stay
            print(f"\r{(bar + text)[:room]}\x1b[K", end="", file=stream, flush=True)
        elif text:
            self.progress(f"    {text}")

    def paint(self, text: str, style: str) -> str:
        """Color, if this goes to a terminal that wants any."""
        if not self.stream.isatty() or not settings.terminal():
            return text
        return f"\x1b[{_COLORS[style]}m{text}\x1b[0m"


def wrapped(text: str, indent: int = 0, hang: int = 0) -> list[str]:
    """Lines of at most 80 columns; words are never broken, so that a command can be copied."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
