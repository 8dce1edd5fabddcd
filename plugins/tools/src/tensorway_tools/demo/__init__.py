"""`tensorway demo`: the three movements on this machine with what is installed, between real processes. For people.

Of the dist nothing else imports this package; it may import the core's host, kit and command line. What a movement
shows is its dist's, see `tensorway.cli.demonstration`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tensorway.cli.arguments import seconds

if TYPE_CHECKING:
    from tensorway.cli.output import Output

_REPORT: Final = Path("tensorway-demo.html")
#: How long one movement may take.
_DEADLINE: Final = seconds(3600)


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `demo` in, exit code out."""
    given = parser().parse_args(arguments)
    from tensorway_tools.demo.run import run

    return run(given, arguments, out)


def parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    text = "Show the three movements between real processes, compare every byte, and write a report."
    top = argparse.ArgumentParser(prog="tensorway demo", description=text)
    top.add_argument(
        "--backend", default="auto", metavar="NAME", help="the transport to move over; `all`: one after the other"
    )
    top.add_argument(
        "--report", type=Path, default=_REPORT, metavar="FILE", help=f"where the report goes (default: {_REPORT})"
    )
    top.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    top.add_argument(
        "--deadline",
        type=_DEADLINE,
        default=60.0,
        metavar="SECONDS",
        help="how long one movement may take (default 60)",
    )
    return top
