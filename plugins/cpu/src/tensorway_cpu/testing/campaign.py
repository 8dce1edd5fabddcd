"""Lives of an engine in which a process is killed at random, each followed by one that must be whole.

    python -m tensorway_cpu.testing.campaign --rounds 200 [--seed N]

May import the core, its `testing` and this package. Manager and workers open in any order, or at once; one of them is
killed while they do, or while they copy. The others end in time, whatever they are told; the next life stores and loads
every byte; and no name is left of any of them.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
import uuid
from collections import Counter
from typing import Final

from tensorway.testing.ranks import RankFailed, RankProcess, Ranks
from tensorway_cpu.names import folder_of_names, name_of, sweep
from tensorway_cpu.testing import sides

#: Process, role and rank.
_SIDES: Final = ((0, "manager", 0), (1, "worker", 0), (2, "worker", 1))
_OPTIONS: Final = {"capacity_blocks": 8}
#: What those may be told who look for somebody that was killed.
_TOLD: Final = ("PeerLost", "MemoryInvalid")


def killed(ranks: Ranks, rng: random.Random) -> str:
    """One life that does not last; what became of it."""
    engine, order, victim = uuid.uuid4().hex, list(_SIDES), rng.randrange(3)
    rng.shuffle(order)
    for process, role, number in order:
        ranks[process].start(sides.open_side, engine, role, number, 2, _OPTIONS)
        time.sleep(rng.choice((0.0, rng.random() / 100)))
        if process == victim and rng.random() < 0.8:  # before others come
            time.sleep(rng.random() / 100)
            ranks[victim].signal(signal.SIGKILL)
    if ranks[victim].alive:
        ranks[victim].signal(signal.SIGKILL)
    told = [said for process, _, _ in order if process != victim and (said := _ended(ranks[process]))]
    ranks.grow(3)
    sweep()
    assert not (folder_of_names() / name_of(engine)).exists(), "a name is left of a life that is over"
    return f"{2 - len(told)} of 2 had rows, {len(told)} were told"


def _ended(process: RankProcess) -> str:
    """What somebody was told who looked for who was killed; empty if it had its rows."""
    try:
        process.result()
    except RankFailed as failure:
        known = [name for name in _TOLD if f".{name}:" in str(failure)]
        if not known:
            raise
        return known[0]
    process.call(sides.close_side)
    return ""


def whole(ranks: Ranks, rng: random.Random) -> None:
    """A life that stores and loads every byte."""
    engine, salt, pages = uuid.uuid4().hex, rng.randrange(1 << 16), rng.sample(range(40), 3)
    for process, role, number in _SIDES:
        ranks[process].start(sides.open_side, engine, role, number, 2, _OPTIONS)
    for process, _, _ in _SIDES:
        ranks[process].result()
    stored = ranks[0].call(sides.prepare, "store", [1, 2, 3])
    for what in ("store", "load"):
        for process in (1, 2):
            ranks[process].call(*((sides.fill, pages, salt) if what == "store" else (sides.forget_pages,)))
            result = ranks[process].call(sides.carry_out, what, stored.target, pages)
            assert not result.cause, result
    assert [0, 0] == [ranks[process].call(sides.wrong_bytes, pages, salt) for process in (1, 2)], "other bytes"
    for process, _, _ in _SIDES:
        ranks[process].call(sides.close_side)
    assert not (folder_of_names() / name_of(engine)).exists()


def run(rounds: int, seed: int, progress: bool = False) -> Counter[str]:
    """So many lives of either kind; how many ended how."""
    rng, seen = random.Random(seed), Counter[str]()
    with Ranks(3) as ranks:
        for number in range(1, rounds + 1):
            seen[killed(ranks, rng)] += 1
            whole(ranks, rng)
            if progress:
                sys.stderr.write(f"\r{number} of {rounds}")
    return seen


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args()
    sys.stderr.write(f"seed {given.seed}\n")
    seen = run(given.rounds, given.seed, progress=True)
    sys.stderr.write("\n")
    for what, count in seen.most_common():
        sys.stdout.write(f"{count:>6} {what}\n")


if __name__ == "__main__":
    main()
