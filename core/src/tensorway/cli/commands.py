"""Commands that plugins bring: listed from metadata, imported when one is run.

Room `cli`; may import every room. The entry-point group is `tensorway.command`; the name is the command's name, and the
value refers to a `Command`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Final

from tensorway.cli import brought
from tensorway.cli.output import Output
from tensorway.errors import PluginDefect
from tensorway.plugins import host, scan
from tensorway.plugins.scan import Declaration, printable

#: What an entry point of the group refers to: a function of the words that follow the command's name, without `--json`
#: and `--debug`, which the `Output` knows of. It returns an exit code, prints through the `Output` and nowhere else
#: (`argparse` may print its help), and raises `TensorwayError` for what cannot be done.
Command = Callable[[list[str], Output], int]

#: Commands of our dists, and the extra that brings each, for who asks for one before it is installed.
EXTRAS: Final = {
    "bench": "tools",
    "demo": "tools",
    "eplb": "eplb",
    "offload": "offload",
    "top": "tools",
    "vllm": "vllm",
}


def split(words: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """The words for a command, and the flags that all commands have, wherever they stand before a `--`."""
    end = words.index("--") if "--" in words else len(words)
    flags = {name: f"--{name}" in words[:end] for name in ("json", "debug")}
    kept = [word for word in words[:end] if word not in ("--json", "--debug")]
    return [*kept, *words[end:]], argparse.Namespace(**flags)


def listed() -> tuple[Declaration, ...]:
    """The commands of plugins, one of each name. Looks at metadata alone, and never raises for what is in it."""
    rows: dict[str, Declaration] = {}
    for row in scan.scan().commands:
        rows.setdefault(row.name, row)
    return tuple(rows.values())


def run(name: str, arguments: list[str], out: Output) -> int:
    """Load one command and run it; returns its exit code."""
    asked = f"The command {printable(name)!r} was asked for."
    return run_one_of(host().commands, name, asked, EXTRAS.get(name, name), arguments, out)


def run_one_of(
    rows: Sequence[Declaration], name: str, asked: str, extra: str, arguments: list[str], out: Output
) -> int:
    """The same for a command among these, for who has commands below its own; `extra` brings it if none does."""
    row = brought.declared(rows, name, asked, extra)
    code = brought.called(row, asked, out, arguments, out)
    if not isinstance(code, int) or not 0 <= code <= 255:
        true = f"{row.dist} {row.version} brings it, and it returned {printable(repr(code))}, which is no exit code."
        raise PluginDefect(asked, true, "Report this to the plugin's author: 0 to 255.")
    return int(code)
