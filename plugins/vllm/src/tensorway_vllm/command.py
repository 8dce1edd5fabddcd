"""`tensorway vllm ...`: words in, exit code out. What an action does is in its own module.

May import this package, and the core's command line for its types.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from tensorway_vllm import doctor
from tensorway_vllm.router import command as router

if TYPE_CHECKING:
    from types import ModuleType

    from tensorway.cli.output import Output

#: Each has `SUMMARY`, `add_arguments` and `run`, and imports what it needs when it runs.
_ACTIONS: Final[dict[str, ModuleType]] = {"doctor": doctor, "router": router}


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `vllm` in, exit code out."""
    given = parser().parse_args(arguments)
    code: int = _ACTIONS[given.action].run(given, out)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all actions."""
    top = argparse.ArgumentParser(prog="tensorway vllm", description="Looks after Tensorway in vLLM.")
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in _ACTIONS.items():
        action.add_arguments(actions.add_parser(name, help=action.SUMMARY, description=action.SUMMARY))
    return top
