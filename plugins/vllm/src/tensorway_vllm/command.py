"""`tensorway vllm ...`: words in, exit code out. What an action does is in its own module, imported when it is asked.

May import this package, and the core's command line for its types.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tensorway_vllm import doctor
from tensorway_vllm.router import command as router

if TYPE_CHECKING:
    from tensorway.cli.output import Output


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `vllm` in, exit code out."""
    given = parser().parse_args(arguments)
    run = {"doctor": doctor.run, "router": router.run}[given.action]
    return run(given, out)


def parser() -> argparse.ArgumentParser:
    """The parser of all actions."""
    top = argparse.ArgumentParser(prog="tensorway vllm", description="Looks after Tensorway in vLLM.")
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    doctor.add_arguments(actions.add_parser("doctor", help=doctor.SUMMARY, description=doctor.SUMMARY))
    router.add_arguments(actions.add_parser("router", help=router.SUMMARY))
    return top
