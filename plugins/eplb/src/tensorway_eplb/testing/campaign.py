"""Ranks that die or stop in the middle of rebalances, at random moments, again and again; and what must hold then.

    python -m tensorway_eplb.testing.campaign [--seed N] [--moments N] [--ranks N] [--options JSON]

May import the core, its `testing` and this dist. Of every survivor: it returns within the deadline and a second, and
names who is missing; every row is what its map says, to the byte; all survivors have the same map; the group goes on
and rebalances again; a new process takes the place of the lost one.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from typing import Any, Final

import numpy as np

from tensorway.testing.ranks import Place, Ranks
from tensorway_eplb.placement import Map, Placement
from tensorway_eplb.testing import engine
from tensorway_eplb.testing.engine import Model, Report

DEADLINE: Final = 6.0
#: How much later than the deadline a survivor may return, as the issue of operators has it.
SLACK: Final = 1.0


def random_rows(rng: random.Random, model: Model, ranks: int) -> Map:
    """Any placement that has every expert."""
    total, rows = ranks * model.slots, []
    for _ in range(model.layers):
        row = [*range(model.experts), *(rng.randrange(model.experts) for _ in range(total - model.experts))]
        rng.shuffle(row)
        rows.append(row)
    return np.array(rows, dtype=np.int32)


class Campaign:
    """One group over many deaths."""

    def __init__(self, seed: int, ranks: int, model: Model) -> None:
        self.rng, self.count, self.model = random.Random(seed), ranks, model
        self.path, self.born = f"/campaign-{seed}/experts", ranks
        self.ranks = Ranks(ranks)
        #: Process of each member, by its rank in the group.
        self.members = [f"p{index}" for index in range(ranks)]
        self.processes = list(range(ranks))
        self.typical = 0.05
        start = Placement.linear(model.layers, model.experts, ranks, model.slots)
        self.ranks.enter(self.processes, engine.join, self.path, 0, model, start)

    def close(self) -> None:
        """End all processes."""
        self.ranks.close()

    def moment(self) -> dict[str, Any]:
        """One death or stop during a rebalance, and all that must hold; returns what happened."""
        rng = self.rng
        rows = random_rows(rng, self.model, self.count)
        victim, number = rng.randrange(self.count), rng.choice([signal.SIGKILL, signal.SIGSTOP])
        when = rng.uniform(0, 1.5 * self.typical)
        for index in self.processes:
            self.ranks[index].start(engine.rebalance, rows, DEADLINE)
        time.sleep(when)
        process = self.ranks[self.processes[victim]]
        process.signal(number)
        reports = {
            rank: self.ranks[index].result(DEADLINE + 30) for rank, index in enumerate(self.processes) if rank != victim
        }
        self._check(victim, number, reports)
        process.close()
        self._go_on(victim)
        took = max(report.seconds for report in reports.values())
        committed = len(next(iter(reports.values())).committed)
        return {"signal": number.name, "after": when, "seconds": took, "committed": committed}

    def quiet(self) -> float:
        """A rebalance in which nobody dies; how long it took."""
        rows = random_rows(self.rng, self.model, self.count)
        reports = self.ranks.each(self.processes, engine.rebalance, rows, DEADLINE)
        for report in reports:
            assert not report.error and not report.wrong and report.placement == rows.tobytes(), report
        return float(max(report.seconds for report in reports))

    def _check(self, victim: int, number: int, reports: dict[int, Report]) -> None:
        for rank, report in reports.items():
            context = f"rank {rank}, {self.members[victim]} got {number}: {report}"
            assert report.seconds <= DEADLINE + SLACK, f"too late: {context}"
            assert not report.wrong, f"rows and map differ: {context}"
            if report.error:  # a victim that had done its part before it died is not missed
                assert report.error == "PeerLost" and self.members[victim] in report.text, f"not named: {context}"
                assert set(report.lost) == {self.members[victim]}, f"others as well: {context}"
        placements = {report.placement for report in reports.values()}
        assert len(placements) == 1, f"survivors differ: {reports}"

    def _go_on(self, victim: int) -> None:
        """Survivors regroup and rebalance; then a new process joins, and experts go there as well."""
        name = self.members[victim]
        left = [index for rank, index in enumerate(self.processes) if rank != victim]
        members = [member for member in self.members if member != name]
        for report in self.ranks.each(left, engine.regroup, members, 20.0):
            assert not report.error and not report.wrong, report
        rows = random_rows(self.rng, self.model, self.count - 1)
        for report in self.ranks.each(left, engine.rebalance, rows, 10.0):
            assert not report.error and not report.wrong and report.placement == rows.tobytes(), report
        new, self.born = f"p{self.born}", self.born + 1
        self.ranks.grow(len(self.ranks))
        fresh = self.processes[victim]
        self.ranks[fresh].start(engine.join, Place(self.path, (new,), 0), self.model, None)
        self.members, self.processes = [*members, new], [*left, fresh]
        reports = self.ranks.each(left, engine.regroup, self.members, 20.0)
        self.ranks[fresh].result(30.0)  # what it raised says more than that the others waited for it
        for report in reports:
            assert not report.error and not report.wrong, report
        self.typical = 0.7 * self.typical + 0.3 * self.quiet()


def main(argv: list[str] | None = None) -> int:
    """Run a campaign; stops at the first thing that does not hold."""
    parser = argparse.ArgumentParser(prog="tensorway_eplb.testing.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--moments", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--communicator", default="onesided")
    parser.add_argument("--options", type=json.loads, default={"transport": "local"})
    given = parser.parse_args(argv)
    say(f"seed {given.seed}: {given.moments} moments, {given.ranks} ranks, {given.communicator}")
    campaign = Campaign(given.seed, given.ranks, Model(communicator=given.communicator, options=given.options))
    slowest, partial, started = 0.0, 0, time.monotonic()
    try:
        for moment in range(given.moments):
            happened = campaign.moment()
            slowest = max(slowest, happened["seconds"])
            partial += 0 < happened["committed"] < campaign.model.layers
            if moment % 20 == 19 or moment == given.moments - 1:
                say(
                    f"{moment + 1} moments in {time.monotonic() - started:.0f} s: no breach; the slowest return "
                    f"{slowest:.2f} s of {DEADLINE + SLACK:.0f}; {partial} with some layers committed and some not"
                )
    finally:
        campaign.close()
    return 0


def say(line: str) -> None:
    """Progress, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
