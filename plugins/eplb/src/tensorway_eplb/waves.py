"""A way from one placement to another in steps that need few staging rows each.

May import the core's ground, numpy, `placement`, `policy` and `plan`. Each step is a placement that a group can serve:
whatever expert the first and the last one hold, every one between holds too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise

import attrs
import numpy as np

from tensorway.errors import StagingFull
from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology


def waves(
    old: Placement, new: Placement, topology: Topology, rows: int, *, excluded: Collection[int] = ()
) -> list[Placement]:
    """The placements to go through, `new` last, so that each step takes at most `rows` staging rows of any rank.

    One row is always enough; more make fewer steps. With none only moves within ranks can be done, and `StagingFull`
    is raised if they are not enough. What only `excluded` ranks hold counts as held by nobody, as in a plan. Epochs
    go up by one with each step.
    """
    rows = max(rows, 0)
    everything = np.ones((old.layers, old.num_logical), dtype=bool)
    most = TransferPlan.make(old, new, topology, copies=everything, excluded=excluded).staging.max(axis=1)
    if most.max() <= rows:
        return [new]
    steps = []
    for layer, needed in enumerate(most.tolist()):
        rest = old.map[layer].tolist(), new.map[layer].tolist()
        if needed <= rows:
            steps.append([rest[1]])
            continue
        way = _Way(*rest, slots=old.slots, rows=rows, outside=_slots_of(excluded, old.slots))
        steps.append([])
        while way.now != way.new:
            if not way.step():
                raise StagingFull(
                    f"Layer {layer} was to be rearranged with {rows} staging rows.",
                    f"It needs 1 row at least, and {needed} to be rearranged in one step.",
                    "Give the pool at least one row.",
                )
            steps[-1].append(way.now)
    count = max(map(len, steps))
    found = []
    for index in range(count):
        rows_now = np.array([each[min(index, len(each) - 1)] for each in steps], dtype=np.int32)
        found.append(Placement(rows_now, old.num_logical, old.ranks, old.epoch + 1 + index))
    return [*found[:-1], attrs.evolve(new, epoch=max(new.epoch, old.epoch + count))]


def _slots_of(ranks: Iterable[int], slots: int) -> frozenset[int]:
    return frozenset(slot for rank in ranks for slot in range(rank * slots, (rank + 1) * slots))


@attrs.define(eq=False)
class _Way:
    """One layer on its way."""

    now: list[int]
    new: list[int]
    slots: int
    rows: int
    #: Slots whose rows no other rank can have.
    outside: frozenset[int]
    #: What must not get lost on the way.
    needed: frozenset[int] = frozenset()
    #: What the slots hold after the step that is being made.
    then: list[int] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        held, wanted = (
            {expert for slot, expert in enumerate(row) if slot not in self.outside} for row in (self.now, self.new)
        )
        self.needed = frozenset((held & wanted) - {EMPTY})

    def step(self) -> bool:
        """Go as far as the rows allow; says whether anything was done."""
        self.then = list(self.now)
        left = self._overwrite()
        self._rotate(left)
        done = self.then != self.now
        self.now = self.then
        return done

    def _overwrite(self) -> list[int]:
        """Give slots their new experts where no needed row gets lost; returns those that hold the last of one."""
        count = dict.fromkeys(self.needed, 0)
        holders: dict[int, list[int]] = {}
        for slot, expert in enumerate(self.now):
            if slot not in self.outside and expert in count:
                count[expert] += 1
                holders.setdefault(expert, []).append(slot)
        waiting = [slot for slot, expert in enumerate(self.now) if expert != self.new[slot]]
        left = dict.fromkeys(waiting)
        waiting.reverse()
        while waiting:
            slot = waiting.pop()
            counted = slot not in self.outside
            last = counted and count.get(self.now[slot]) == 1
            if slot not in left or last or not self._set([(slot, self.new[slot])]):
                continue
            del left[slot]
            if counted and self.now[slot] in count:
                count[self.now[slot]] -= 1
            if counted and self.new[slot] in count:
                count[self.new[slot]] += 1
                # It is in one more slot now: those that hold it may let go of it.
                waiting.extend(other for other in holders[self.new[slot]] if other in left)
        return [slot for slot in left if slot not in self.outside and count.get(self.now[slot]) == 1]

    def _rotate(self, left: list[int]) -> None:
        """Cycles in which each slot has the last row of what another one wants: together, or in parts.

        A part leaves one slot with an expert that is not its own; no row is lost, and the cycle is shorter.
        """
        seekers: dict[int, list[int]] = {}
        for slot in left:
            seekers.setdefault(self.new[slot], []).append(slot)
        gone: set[int] = set()
        for first in left:
            cycle = self._cycle(first, seekers, gone)
            gone.update(cycle)
            if not cycle or self._set(_turned(cycle, self.now)) or self._fits_alone(cycle):
                continue  # there is none, or it is done, or it is for a step that has more rows left
            for length in range(2, len(cycle) + 1):
                if not self._set(_turned(cycle[:length], self.now)[-2:]):
                    break

    def _cycle(self, first: int, seekers: dict[int, list[int]], gone: set[int]) -> list[int]:
        """From a slot to the one that wants what it has, and so on, until the first one comes again; or nothing."""
        cycle = [first]
        while first not in gone:
            found = [slot for slot in seekers.get(self.now[cycle[-1]], ()) if slot not in gone]
            if first in found:
                return cycle
            if not found:
                break
            cycle.append(found[0])
        return []

    def _set(self, changes: list[tuple[int, int]]) -> bool:
        """Let slots hold experts after this step, if the rows of their ranks are enough for it."""
        before = [(slot, self.then[slot]) for slot, _ in changes]
        for slot, expert in changes:
            self.then[slot] = expert
        if all(self._cost(self.then, rank) <= self.rows for rank in {slot // self.slots for slot, _ in changes}):
            return True
        for slot, expert in before:
            self.then[slot] = expert
        return False

    def _fits_alone(self, cycle: list[int]) -> bool:
        then = list(self.now)
        for slot, expert in _turned(cycle, self.now):
            then[slot] = expert
        return all(self._cost(then, rank) <= self.rows for rank in {slot // self.slots for slot in cycle})

    def _cost(self, then: list[int], rank: int) -> int:
        part = slice(rank * self.slots, (rank + 1) * self.slots)
        return staging_rows(self.now[part], then[part])


def _turned(cycle: list[int], now: list[int]) -> list[tuple[int, int]]:
    """What each slot gets if it is given what the one before it has; the first gets what the last has.

    The last slot and the first come last: they are what differs from a cycle that ends one slot earlier.
    """
    given = [(slot, now[before]) for before, slot in pairwise(cycle)]
    return [*given, (cycle[0], now[cycle[-1]])]


def staging_rows(now: list[int], then: list[int]) -> int:
    """What a plan takes of one rank in one layer: its arrivals, and one row if its copies have a cycle."""
    written = [after not in (before, EMPTY) for before, after in zip(now, then, strict=True)]
    # As in a plan: the lowest slot that keeps its row, or else the lowest.
    order = sorted(range(len(now)), key=lambda slot: (written[slot], slot), reverse=True)
    source = {now[slot]: slot for slot in order}
    wanted = [(slot, then[slot]) for slot in range(len(now)) if written[slot]]
    arriving = {expert for _, expert in wanted if expert not in source}
    reads = {slot: source[expert] for slot, expert in wanted if expert in source}
    while reads:
        read = set(reads.values())
        rest = {slot: start for slot, start in reads.items() if slot in read}
        if len(rest) == len(reads):
            return len(arriving) + 1
        reads = rest
    return len(arriving)
