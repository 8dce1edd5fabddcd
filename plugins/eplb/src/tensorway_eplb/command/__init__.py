"""`tensorway eplb`: plan a rebalance, or replay a series of loads through several policies. For people.

Of the dist nothing else imports this package; it may import all of the dist, and, being for the command line, the
core's front door and its `Output`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorway.cli.output import Output


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `eplb` in, exit code out."""
    given = parser().parse_args(arguments)
    if given.action == "plan":
        from tensorway_eplb.command import plan

        return plan.run(given, out)
    from tensorway_eplb.command import replay

    return replay.run(given, out)


def parser() -> argparse.ArgumentParser:
    """The parser of both actions."""
    top = argparse.ArgumentParser(
        prog="tensorway eplb", description="Plans and replays rebalances. Nothing is moved by either."
    )
    actions = top.add_subparsers(dest="action", required=True, metavar="plan|replay")
    text = "Say what one rebalance would change, move and cost."
    plan = actions.add_parser("plan", help=text, description=text)
    plan.add_argument("--loads", required=True, type=Path, metavar="FILE", help="loads by layer and expert")
    plan.add_argument(
        "--policy", default="incremental", metavar="NAME", help="name[:option=value]... (default: incremental)"
    )
    _add_question(plan)
    plan.add_argument("--rate", type=_positive, metavar="BYTES/S", help="what a rank was measured to send or receive")
    plan.add_argument("--row-bytes", type=_count, metavar="N", help="bytes of one expert in one layer, all tensors")
    plan.add_argument("--work", type=_positive, metavar="SECONDS", help="time in experts until the next rebalance")
    plan.add_argument("--min-gain", type=_share, default=0.01, metavar="SHARE", help="of the gate (default 0.01)")
    plan.add_argument("--output", type=Path, metavar="FILE", help="save the new placement here")
    plan.add_argument("--dry-run", action="store_true", help="save nothing")
    text = "Run a series of loads through several policies, side by side."
    replay = actions.add_parser("replay", help=text, description=text)
    replay.add_argument("--loads", required=True, type=Path, nargs="+", metavar="FILE", help="loads, in order of time")
    replay.add_argument(
        "--policies",
        default="deepseek,deepseek:relabel=true,incremental",
        metavar="NAMES",
        help="name[:option=value]..., with commas between them",
    )
    _add_question(replay)
    return top


def _add_question(to: argparse.ArgumentParser) -> None:
    """What both actions ask: the start, the ranks, the budget, and where a picture goes."""
    to.add_argument("--placement", type=Path, metavar="FILE", help="the placement that is there")
    to.add_argument("--ranks", type=_count, metavar="N", help="without --placement: experts in order on so many ranks")
    to.add_argument("--slots", type=_count, metavar="N", help="... of so many slots each")
    to.add_argument("--per-node", type=_count, metavar="N", help="ranks of one node (default: all)")
    to.add_argument("--speeds", type=_speeds, metavar="LIST", help="how fast each rank is: 1,1,0.5 (default: alike)")
    to.add_argument("--budget", type=_budget, metavar="N", help="rows that all ranks may receive in one layer")
    to.add_argument("--plot", type=Path, metavar="FILE", help="draw it: FILE.html, or FILE.png with matplotlib")


def _count(text: str) -> int:
    return _number(text, int(text), 1)


def _budget(text: str) -> int:
    return _number(text, int(text), 0)


def _number(text: str, number: int, least: int) -> int:
    if not least <= number < 1 << 48:
        raise argparse.ArgumentTypeError(f"a whole number from {least} on")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("a number above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError("a number from 0 to below 1")
    return number


def _speeds(text: str) -> tuple[float, ...]:
    return tuple(_positive(part) for part in text.split(","))
