"""The steps by which one layer is improved: who exchanges which slots, and who gets one more replica.

May import this dist's ground. Every step is the best there is, ties go to the lowest index, and loads are grains: equal
questions have equal answers on every machine.
"""

from __future__ import annotations

import math
from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway_eplb.grains import shares
from tensorway_eplb.placement import EMPTY, Loads
from tensorway_eplb.policy_options import IncrementalOptions

Index = NDArray[np.int64]


def improve(state: LayerState, most: int, options: IncrementalOptions) -> None:
    """Make steps while they pay, and while no more than `most` rows are received for all of them together."""
    goal, least = state.ideal * (1 + options.tolerance), options.min_gain * state.ideal
    _descend(state, most, goal, least)
    for _ in range(_ROUNDS):
        reached = state.times.max()
        if reached <= goal:
            return
        # No step helps by itself. A replica of a hot expert may once the rank that takes it has given something away.
        before = state.row.copy()
        for expert in state.by_heat(int(state.times.argmax()))[:_TRIED]:
            step = state.best_replica(expert, most, goal)
            if step is not None:
                state.take(step)
                _descend(state, most, goal, least)
                if state.times.max() < reached - least:
                    break
                state.restore(before)
        else:
            return


#: So many experts of the slowest rank are tried where no step helps by itself.
_TRIED: Final = 3
#: ... and so often.
_ROUNDS: Final = 8


def _descend(state: LayerState, most: int, goal: float, least: float) -> None:
    """Make the best step again and again, until the slowest rank is fast enough or no step makes it faster."""
    # Each step makes the slowest rank faster, so this ends by itself; the bound is for loads that tie in every grain.
    for _ in range(4 * len(state.row)):
        times = state.times
        slowest = int(times.argmax())
        enough = times[slowest] - least
        if times[slowest] <= goal:
            return
        # The cheap questions first: replicas of what is not the hottest are looked at where nothing else helps.
        hottest, *others = state.by_heat(slowest) or [EMPTY]
        steps = [state.best_exchange(slowest, most, goal), state.best_replica(hottest, most, goal)]
        if not any(step.time < enough for step in steps if step is not None):
            steps = [state.best_replica(expert, most, goal) for expert in others]
        worth = [step for step in steps if step is not None and step.time < enough]
        if not worth:
            return
        state.take(min(worth, key=lambda step: step.cost))


@attrs.frozen
class _Step:
    """Slots with the experts that they would hold, the slowest of the ranks that change, and what it costs."""

    slots: tuple[int, ...]
    experts: tuple[int, ...]
    time: float
    receives: int
    cost: tuple[float, ...]


class LayerState:
    """One layer while it is improved. `row` is written to."""

    def __init__(self, row: Index, load: Loads, speed: Loads, slots: int) -> None:
        self.row, self.load, self.speed, self.slots = row, load, speed, slots
        self.rank_of = np.arange(len(row)) // slots
        experts, ranks = len(load), len(speed)
        #: How often each rank holds each expert; the last column is that of EMPTY.
        self.held = np.zeros((ranks, experts + 1), dtype=np.int64)
        np.add.at(self.held, (self.rank_of, row), 1)
        #: What a rank has already, and what is loaded from a copy because nobody has it: no receives.
        self.free = (self.held > 0) | (self.held.sum(axis=0) == 0)
        self.free[:, EMPTY] = True
        self.receives = 0
        self._count()

    def _count(self) -> None:
        """The loads, from who holds what."""
        self.counts = self.held.sum(axis=0)
        self.counts[EMPTY] = 0
        self.share = np.append(shares(self.load, self.counts[:-1].astype(np.float64)), 0.0)
        self.filled = np.bincount(self.rank_of, self.share[self.row], minlength=len(self.speed))

    @property
    def ideal(self) -> float:
        """How long each rank would take if all could be shared out."""
        return float(self.load.sum()) / math.fsum(self.speed)

    @property
    def times(self) -> Loads:
        """How long each rank takes."""
        times: Loads = self.filled / self.speed
        return times

    def put(self, slot: int, expert: int) -> None:
        """Write one slot."""
        rank = self.rank_of[slot]
        self._hold(rank, self.row[slot], -1)
        self._hold(rank, expert, 1)
        self.row[slot] = expert

    def _hold(self, rank: int, expert: int, change: int) -> None:
        before = self.held[rank, expert] > 0
        self.held[rank, expert] += change
        self.receives += int((self.held[rank, expert] > 0) - int(before)) * int(not self.free[rank, expert])

    def take(self, step: _Step) -> None:
        """Make a step."""
        for slot, expert in zip(step.slots, step.experts, strict=True):
            self.put(slot, expert)
        self._count()

    def restore(self, row: Index) -> None:
        """Make it hold what it held before."""
        for slot in np.flatnonzero(self.row != row):
            self.put(int(slot), int(row[slot]))
        self._count()

    def place_lost(self) -> None:
        """Give each expert that nobody holds a slot, the hottest first: an empty one, or a replica's of the coolest."""
        lost = np.flatnonzero(self.counts[:-1] == 0)
        for expert in lost[np.argsort(-self.load[lost], kind="stable")]:
            left = np.where(self.row == EMPTY, -1.0, self.share[self.row])
            left[(self.row != EMPTY) & (self.counts[self.row] < 2)] = np.inf
            if not np.isfinite(left.min()):
                return  # there are more experts than slots
            candidates = np.flatnonzero(left == left.min())
            slot = int(candidates[self.times[self.rank_of[candidates]].argmin()])
            self.put(slot, int(expert))
            self._count()

    def best_exchange(self, slowest: int, most: int, goal: float) -> _Step | None:
        """The exchange of a slot of this rank with one elsewhere that leaves the slower of the two fastest."""
        mine = np.arange(slowest * self.slots, (slowest + 1) * self.slots)
        theirs = np.flatnonzero(self.rank_of != slowest)
        out, rank = self.row[mine][:, None], self.rank_of[theirs]
        into = self.row[theirs]
        shift = self.share[out] - self.share[into]
        here = (self.filled[slowest] - shift) / self.speed[slowest]
        time = np.maximum(here, (self.filled[rank] + shift) / self.speed[rank])
        receives = self._more(rank, out) + self._more(slowest, into) - self._less(slowest, out) - self._less(rank, into)
        time = np.where((shift > 0) & (self.receives + receives <= most), time, np.inf)
        at = _first(time.reshape(-1), receives.reshape(-1), goal)
        i, j = divmod(at, len(theirs))
        if not np.isfinite(time[i, j]):
            return None
        slots = (int(mine[i]), int(theirs[j]))
        found = float(time[i, j]), int(receives[i, j])
        return _Step(slots, (int(into[j]), int(out[i, 0])), *found, (max(goal, found[0]), found[1], found[0]))

    def _more(self, rank: Index | int, expert: Index) -> Index:
        """Whether a rank would have to receive an expert."""
        more: Index = ((self.held[rank, expert] == 0) & ~self.free[rank, expert]).astype(np.int64)
        return more

    def _less(self, rank: Index | int, expert: Index) -> Index:
        """Whether a rank would not have to receive an expert any more."""
        less: Index = ((self.held[rank, expert] == 1) & ~self.free[rank, expert]).astype(np.int64)
        return less

    def by_heat(self, rank: int) -> list[int]:
        """The experts of a rank, the one with the most to do first."""
        mine = self.row[rank * self.slots : (rank + 1) * self.slots]
        experts = np.unique(mine[mine != EMPTY])
        return [int(expert) for expert in experts[np.argsort(-self.share[experts], kind="stable")]]

    def best_replica(self, hot: int, most: int, goal: float) -> _Step | None:
        """One more replica of an expert, in a slot whose expert has others, or in an empty one."""
        slots = np.flatnonzero((self.row != hot) & ((self.row == EMPTY) | (self.counts[self.row] > 1)))
        rank, cool = self.rank_of[slots], self.row[slots]
        receives = self._more(rank, np.full(len(slots), hot)) - self._less(rank, cool)
        hotter = np.rint(self.load[hot] / (self.counts[hot] + 1))
        taken = (self.filled[rank] + hotter - self.share[cool]) / self.speed[rank]
        kept = np.flatnonzero(self.receives + receives <= most)
        kept = kept[np.argsort(taken[kept], kind="stable")[:_CANDIDATES]]
        slots, rank, cool, receives = slots[kept], rank[kept], cool[kept], receives[kept]
        if not len(slots):
            return None
        number = np.arange(len(slots))
        # What the remaining replicas of the cool expert take over; an empty slot has none.
        weight = np.append(self.load, 0.0)[cool]
        cooler = np.rint(weight / np.maximum(self.counts[cool] - 1, 1))
        filled = self.filled + self.held[:, hot] * (hotter - self.share[hot])
        after = filled + self.held[:, cool].T * (cooler - self.share[cool])[:, None]
        after[number, rank] += hotter - cooler
        after = after / self.speed
        changed = (self.held[:, hot] + self.held[:, cool].T) > 0
        changed[number, rank] = True
        time = np.where(changed, after, 0.0).max(axis=1)
        at = _first(time, receives, goal)
        found = float(time[at]), int(receives[at])
        return _Step((int(slots[at]),), (hot,), *found, (max(goal, found[0]), found[1], found[0]))


#: So many slots are looked at for one more replica, those first whose rank would be the fastest with it.
_CANDIDATES: Final = 64


def _first(time: Loads, receives: Index, goal: float) -> int:
    """The fastest, or the one with the fewest receives of those that are fast enough."""
    enough = np.flatnonzero(time <= goal)
    if not len(enough):
        return int(time.argmin())
    cheap = enough[receives[enough] == receives[enough].min()]
    return int(cheap[time[cheap].argmin()])
