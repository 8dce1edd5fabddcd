"""`tensorway offload`: replays traces through eviction policies, and runs what other dists bring for tiers.

Of the dist nothing else imports this package; it may import all of the dist, and, being for the command line, the
core's front door, its host and its command line.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tensorway.cli.output import Output

#: The words after `offload` that this dist knows itself.
OWN: Final = ("replay",)
#: What brings the words that operators of files know: whoever asks for one is told how to get it.
_OF_FILES: Final = ("ls", "stat", "verify", "gc")


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `offload` in, exit code out."""
    from tensorway.plugins import host

    rows = [row for row in host().offload_commands if row.name not in OWN]
    name = arguments[0] if arguments else ""
    if name and name not in OWN and name in (*_OF_FILES, *(row.name for row in rows)):
        from tensorway.cli import commands

        return commands.run_one_of(rows, name, f"The command 'offload {name}' was asked for.", "fs", arguments[1:], out)
    given = parser({row.name: f"From {row.dist} {row.version}." for row in rows}).parse_args(arguments)
    from tensorway_offload.command.replay import run

    return run(given, out)


def parser(others: dict[str, str] | None = None) -> argparse.ArgumentParser:
    """The parser of our own words; those of others are listed."""
    top = argparse.ArgumentParser(prog="tensorway offload", description="Looks after what is kept outside the device.")
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "Replay a trace of requests through eviction policies, beside the best that could be."
    replay = actions.add_parser("replay", help=text, description=text)
    replay.add_argument("trace", type=Path, metavar="TRACE", help="one JSON object a line, with hash_ids")
    replay.add_argument(
        "--capacities",
        type=_capacities,
        default="1%,3%,10%,30%",
        metavar="LIST",
        help="numbers of blocks, or shares of all blocks (default: 1%%,3%%,10%%,30%%)",
    )
    replay.add_argument(
        "--policies", metavar="NAMES", help="name[:option=value]..., with commas between them (default: all)"
    )
    replay.add_argument("--plot", type=Path, metavar="FILE", help="draw it: FILE.html, or FILE.png with matplotlib")
    for name, summary in (others or {}).items():
        actions.add_parser(name, help=summary, add_help=False)
    return top


def _capacities(text: str) -> tuple[str, ...]:
    """Each a number of blocks or a percentage, as it was written."""
    given = tuple(part.strip() for part in text.split(","))
    for part in given:
        number = re.fullmatch(r"(\d{1,12}|\d{1,3}(\.\d{1,4})?%)", part, re.ASCII)
        if not number or not 0 < float(part.rstrip("%")) or (part.endswith("%") and float(part[:-1]) > 100):
            raise argparse.ArgumentTypeError("numbers of blocks or percentages above 0, with commas between them")
    if len(given) > 100:
        raise argparse.ArgumentTypeError("at most 100 capacities")
    return given
