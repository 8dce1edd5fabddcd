"""Commands that plugins bring: listed from metadata, imported when one is run.

Room `cli`; may import every room. The entry-point group is `tensorway.command`; the name is the command's name, and the
value refers to a `Command`.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from typing import Final

from tensorway.cli.output import Output
from tensorway.errors import BackendConflict, BackendNotFound, BackendUnavailable, PluginDefect, TensorwayError
from tensorway.plugins import host, scan
from tensorway.plugins.scan import Declaration, printable
from tensorway.plugins.slots import Slot, describe, import_problem
from tensorway.references import resolve

#: What an entry point of the group refers to: a function of the words that follow the command's name, without `--json`
#: and `--debug`, which the `Output` knows of. It returns an exit code, prints through the `Output` and nowhere else
#: (`argparse` may print its help), and raises `TensorwayError` for what cannot be done.
Command = Callable[[list[str], Output], int]

#: Extras of ours that bring a command of their own name, for who asks for it before it is installed.
EXTRAS: Final = ("eplb",)


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
    row = _declared(name)
    command = _loaded(row)
    asked, brings = _asked(name), f"{row.dist} {row.version} brings it"
    try:
        code: object = command(arguments, out)
    except (TensorwayError, BrokenPipeError):
        raise
    except Exception as error:
        to_do = "Run it again with --debug, and report what it prints to the plugin's author."
        if out.debug:
            raise
        raise PluginDefect(asked, f"{brings}, and it raised {describe(error)}", to_do) from error
    if not isinstance(code, int) or not 0 <= code <= 255:
        true = f"{brings}, and it returned {printable(repr(code))}, which is no exit code."
        raise PluginDefect(asked, true, "Report this to the plugin's author: 0 to 255.")
    return int(code)


def _asked(name: str) -> str:
    return f"The command {printable(name)!r} was asked for."


def _declared(name: str) -> Declaration:
    rows = [row for row in host().commands if row.name == name]
    if not rows:
        true, to_do = "Nothing that is installed brings it.", f'Install what does: pip install "tensorway[{name}]"'
        raise BackendNotFound(_asked(name), true, to_do)
    usable = [row for row in rows if not host().left_out(row)]
    if not usable:
        true = f"{rows[0].dist} {rows[0].version} brings it, but {host().left_out(rows[0])}."
        raise BackendUnavailable(_asked(name), true, "Change TENSORWAY_PLUGINS to use it.")
    if len(usable) > 1:
        true = f"{len(usable)} dists bring one of that name: {', '.join(row.dist for row in usable)}."
        deny = f"TENSORWAY_PLUGINS=-command:{usable[1].label}"
        raise BackendConflict(_asked(name), true, f"Uninstall one of them, or deny one: {deny}.")
    return usable[0]


def _loaded(row: Declaration) -> Command:
    """Import it; what goes wrong is the plugin's defect."""
    asked, brings = _asked(row.name), f"{row.dist} {row.version} brings it"
    # A slot knows how to tell a plugin of another generation, whose code must not be imported.
    slot = Slot(row, on_record=lambda record: None, load_lock=threading.RLock())
    slot.check_api()
    if slot.record is not None:
        raise PluginDefect(asked, f"{brings}, but {slot.record.reason}.", slot.record.remedy)
    try:
        command = resolve(row.value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit from a plugin is no exit code of ours
        _, remedy = import_problem(row, error)
        raise PluginDefect(asked, f"{brings}, but importing {row.value} raised {describe(error)}", remedy) from error
    if not callable(command):
        true = f"{brings}, but {row.value} is of type {type(command).__name__}, not a function."
        raise PluginDefect(asked, true, "Report this to the plugin's author.")
    found: Command = command
    return found
