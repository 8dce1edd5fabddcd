"""What dists bring for the command line beside backends: found by name, loaded when it is asked for, and called.

Room `cli`; may import every room. Whatever is wrong with it is three lines that name the dist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from tensorway.cli.output import Output
from tensorway.errors import BackendConflict, BackendNotFound, BackendUnavailable, PluginDefect, TensorwayError
from tensorway.plugins import host
from tensorway.plugins.scan import Declaration
from tensorway.plugins.slots import Slot, describe, import_problem
from tensorway.references import resolve


def declared(rows: Sequence[Declaration], name: str, asked: str, extra: str) -> Declaration:
    """The one of this name that may be used; raises what is true instead."""
    named = [row for row in rows if row.name == name]
    if not named:
        true, to_do = "Nothing that is installed brings it.", f'Install what does: pip install "tensorway[{extra}]"'
        raise BackendNotFound(asked, true, to_do)
    usable = [row for row in named if not host().left_out(row)]
    if not usable:
        true = f"{named[0].dist} {named[0].version} brings it, but {host().left_out(named[0])}."
        raise BackendUnavailable(asked, true, "Change TENSORWAY_PLUGINS to use it.")
    if len(usable) > 1:
        true = f"{len(usable)} dists bring one of that name: {', '.join(row.dist for row in usable)}."
        deny = f"TENSORWAY_PLUGINS=-{usable[1].kind}:{usable[1].label}"
        raise BackendConflict(asked, true, f"Uninstall one of them, or deny one: {deny}.")
    return usable[0]


def called(row: Declaration, asked: str, out: Output, *given: object) -> object:
    """Import it and call it; what goes wrong is the plugin's defect, unless it says what cannot be done."""
    function, brings = _function(row, asked), f"{row.dist} {row.version} brings it"
    try:
        return function(*given)
    except (TensorwayError, BrokenPipeError):
        raise
    except Exception as error:
        to_do = "Run it again with --debug, and report what it prints to the plugin's author."
        if out.debug:
            raise
        raise PluginDefect(asked, f"{brings}, and it raised {describe(error)}", to_do) from error


def loaded(row: Declaration, asked: str) -> Any:
    """Import it; what goes wrong is the plugin's defect."""
    brings = f"{row.dist} {row.version} brings it"
    # A slot knows how to tell a plugin of another generation, whose code must not be imported.
    slot = Slot(row, on_record=lambda record: None, load_lock=threading.RLock())
    slot.check_api()
    if slot.record is not None:
        raise PluginDefect(asked, f"{brings}, but {slot.record.reason}.", slot.record.remedy)
    try:
        return resolve(row.value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit from a plugin is no exit code of ours
        _, remedy = import_problem(row, error)
        raise PluginDefect(asked, f"{brings}, but importing {row.value} raised {describe(error)}", remedy) from error


def _function(row: Declaration, asked: str) -> Callable[..., Any]:
    brings, found = f"{row.dist} {row.version} brings it", loaded(row, asked)
    if not callable(found):
        true = f"{brings}, but {row.value} is of type {type(found).__name__}, not a function."
        raise PluginDefect(asked, true, "Report this to the plugin's author.")
    function: Callable[..., Any] = found
    return function
