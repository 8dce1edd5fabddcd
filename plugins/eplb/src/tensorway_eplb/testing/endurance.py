"""Many rebalances and regroups of one group, and what its processes hold at the end that they did not hold before.

    python -m tensorway_eplb.testing.endurance [--seed N] [--rebalances N] [--ranks N] [--options JSON]

May import the core, its `testing` and this dist. After every tenth rebalance a member says goodbye, the others go on
without it, and it comes back and is given experts again: two regroups. Files and threads must be as many as after the
first fifth, memory must not grow by more than noise, and a group that rests must not compute.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from tensorway.testing.ranks import Place, Ranks
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing import engine
from tensorway_eplb.testing.campaign import random_rows, say
from tensorway_eplb.testing.engine import Model

#: Rebalances between two regroups, on average: a tenth of them are followed by a goodbye and a return.
EVERY: Final = 10
#: What noise may be: pages that the allocator keeps, files of a connection that is being made.
KEPT: Final = {"files": 2, "threads": 1, "mappings": 24, "kilobytes": 6144}
#: Seconds of rest, and the share of a processor that a rank may take meanwhile.
REST: Final = 3.0
IDLE: Final = 0.05
DEADLINE: Final = 40.0


class Endurance:
    """One group for a long time."""

    def __init__(self, seed: int, ranks: int, model: Model) -> None:
        self.rng, self.count, self.model = random.Random(seed), ranks, model
        self.path = f"/endurance-{seed}/experts"
        self.ranks = Ranks(ranks)
        #: The process of each member, by its rank in the group; member n is process n.
        self.order = list(range(ranks))
        self.regroups = 0
        start = Placement.linear(model.layers, model.experts, ranks, model.slots)
        self.ranks.enter(self.order, engine.join, self.path, 0, model, start)

    def close(self) -> None:
        """End all processes."""
        self.ranks.close()

    def rebalance(self) -> None:
        """To a random placement, and compare every byte."""
        rows = random_rows(self.rng, self.model, len(self.order))
        for report in self.ranks.each(self.order, engine.rebalance, rows, DEADLINE):
            assert not report.error and not report.wrong and report.placement == rows.tobytes(), report

    def go_and_return(self) -> None:
        """One member leaves, the others work, and it comes back as the last one."""
        goes = self.rng.choice(self.order)
        self.ranks[goes].call(engine.leave)
        self.order.remove(goes)
        self._regroup(self.order)
        self.rebalance()
        self.ranks[goes].start(engine.join, Place(self.path, (f"p{goes}",), 0), self.model, None)
        left, self.order = self.order, [*self.order, goes]
        self._regroup(left, [goes])

    def held(self) -> list[dict[str, int]]:
        """What each process holds, by its number."""
        return list(self.ranks.each(range(self.count), engine.resources))

    def idle(self) -> float:
        """The largest share of a processor that a resting rank takes."""
        return float(max(self.ranks.each(range(self.count), engine.rest, REST)))

    def _regroup(self, who: list[int], joins: Sequence[int] = ()) -> None:
        self.regroups += 1
        reports = self.ranks.each(who, engine.regroup, [f"p{index}" for index in self.order], DEADLINE)
        for rank in joins:  # what one that joins raised says more than that the others waited for it
            self.ranks[rank].result(DEADLINE)
        for report in reports:
            assert not report.error and not report.wrong, report


def compare(before: list[dict[str, int]], after: list[dict[str, int]]) -> list[str]:
    """What grew by more than noise, in the process that holds most: who is rank 0 may hold more than the others."""
    most = {what: tuple(max(held[what] for held in each) for each in (before, after)) for what in KEPT}
    return [
        f"a process has {now} {what}, and the one with most had {then}"
        for what, (then, now) in most.items()
        if now > then + KEPT[what]
    ]


def main(argv: list[str] | None = None) -> int:
    """Run; ends with 1 and what has grown if anything has."""
    parser = argparse.ArgumentParser(prog="tensorway_eplb.testing.endurance", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--rebalances", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--communicator", default="onesided")
    parser.add_argument("--options", type=json.loads, default={"transport": "local"})
    given = parser.parse_args(argv)
    say(f"seed {given.seed}: {given.rebalances} rebalances, {given.ranks} ranks, {given.communicator}")
    model = Model(layers=3, communicator=given.communicator, options=given.options)
    endurance = Endurance(given.seed, given.ranks, model)
    fifth, before, idle, started = max(1, given.rebalances // 5), list[dict[str, Any]](), 0.0, time.monotonic()
    try:
        for number in range(1, given.rebalances + 1):
            endurance.rebalance()
            if number % (2 * EVERY) == 0:
                endurance.go_and_return()
            if number % fifth == 0:
                before = before or endurance.held()
                took = time.monotonic() - started
                say(f"{number} rebalances, {endurance.regroups} regroups in {took:.0f} s: {endurance.held()[0]}")
        grown, idle = compare(before, endurance.held()), endurance.idle()
    finally:
        endurance.close()
    say(f"at rest a rank takes {idle:.1%} of a processor; {'; '.join(grown) or 'nothing has grown'}")
    return int(bool(grown) or idle > IDLE)


if __name__ == "__main__":
    sys.exit(main())
