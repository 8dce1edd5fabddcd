"""The command line of this dist's campaigns: how much, which seed, which folder. May import the standard library."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Campaign = Callable[[Path, int, int, Callable[[str], None]], Counter[str]]


def run(campaign: Campaign, amount: str, description: str, arguments: list[str] | None = None) -> int:
    """Carry a campaign out as the command line says: folder, amount and seed in, progress and findings out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{amount}", type=int, default=1000, dest="amount", metavar="N")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="where there is room for a few megabytes")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        counts = campaign(Path(folder), given.amount, given.seed, _say)
    _say(f"seed {given.seed}, {time.monotonic() - begun:.0f} s: {dict(counts)}")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
