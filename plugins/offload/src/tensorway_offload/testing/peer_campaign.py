"""Peers that are killed, stopped and hurried at random, by a seed: what is read from them is right, or is missing.

    python -m tensorway_offload.testing.peer_campaign [--seed N] [--count N]

May import the core, its `testing` and this dist. Lenders are processes of their own that evict and store without end;
the reader is here, and compares every byte that it is given.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import tensorway
from tensorway.testing.ranks import SECRET, Ranks
from tensorway_offload.testing import peers
from tensorway_offload.testing.peers import Engine, churned

_LENDERS: Final = 2
#: Blocks that come and go at a lender, of which a third is there at a time.
_BLOCKS: Final = 192
#: Reads between two things that happen to lenders.
_READS: Final = 20


class Peers:
    """One reader and its lenders."""

    def __init__(self, seed: int) -> None:
        self.rng, self.counts, self.ranks = random.Random(seed), Counter[str](), Ranks(_LENDERS)
        given = {"address": self.ranks.rendezvous.address, "secret": SECRET}
        self._rendezvous = tensorway.create("rendezvous", "direct", given)
        options = {"answer": 0.1, "rest": 0.05, "lease": 0.5}
        self.reader = Engine(self._rendezvous, "reader", options=options)
        self._stopped: set[int] = set()
        for index in range(_LENDERS):
            self._open(index)

    def run(self, rounds: int, progress: Callable[[int, Counter[str]], None] = lambda done, counts: None) -> None:
        """So many rounds; raises for the first wrong byte."""
        for number in range(rounds):
            for _ in range(_READS):
                self._read()
            self._happen(self.rng.randrange(_LENDERS))
            progress(number + 1, self.counts)

    def close(self) -> None:
        """End all processes."""
        for index in self._stopped:
            self.ranks[index].signal(signal.SIGCONT)
        self.reader.tier.close()
        self._rendezvous.close()
        self.ranks.close()

    def _open(self, index: int) -> None:
        self.ranks[index].call(peers.open_engine, f"lender-{index}", [])
        self.ranks[index].call(peers.begin_churn)

    def _read(self) -> None:
        some = [churned(number) for number in self.rng.sample(range(_BLOCKS), self.rng.randrange(1, 17))]
        if self.rng.random() < 0.8:
            self.reader.tier.contains(some, 1.0)
        outcomes, right = self.reader.get(some, self.rng.choice((0.002, 0.05, 1.0)), first=16)
        for outcome, good in zip(outcomes, right, strict=True):
            assert good or outcome != "done", "a block that is not what its key stands for"
            self.counts[outcome] += 1

    def _happen(self, index: int) -> None:
        what = self.rng.choice(("stop", "stop", "go on", "go on", "kill"))
        rank = self.ranks[index]
        if what == "stop" and index not in self._stopped:
            rank.signal(signal.SIGSTOP)
            self._stopped.add(index)
        elif what == "go on" and index in self._stopped:
            rank.signal(signal.SIGCONT)
            self._stopped.remove(index)
        elif what == "kill":
            rank.signal(signal.SIGKILL)
            self._stopped.discard(index)
            self.ranks.grow(_LENDERS)
            self._open(index)
        else:
            return
        self.counts[what] += 1


def main(argv: list[str] | None = None) -> int:
    """A campaign from the command line."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="tensorway_offload.testing.peer_campaign", description=about)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args(argv)
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def progress(done: int, counts: Counter[str]) -> None:
        if not done % 20:
            say(f"{done:,} rounds in {time.monotonic() - started:.0f} s, {counts['done']:,} blocks read")

    say(f"seed {given.seed}: {given.count:,} rounds of {_READS} reads")
    campaign = Peers(given.seed)
    try:
        campaign.run(given.count, progress)
    finally:
        campaign.close()
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(campaign.counts.items()))
    say(f"no wrong byte in {time.monotonic() - started:.0f} s: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
