"""The arithmetic of a plan: which rows move, from where, in which order; for all layers and ranks at once.

May import numpy, `placement` and `policy`; only `plan` and `waves` import it. Columns of one table belong together:
entry `i` of each is one move. Several numbers are packed into one and sorted, which is what makes it fast.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.policy import Topology

#: The slot that stands for one more staging row, in which a row waits while a cycle of copies is resolved.
TEMPORARY: Final = -1

Column: TypeAlias = NDArray[np.int64]


@attrs.frozen(eq=False)
class Fetches:
    """Rows that a rank brings from a slot of another: sorted by layer, target, turn of the source, expert."""

    layer: Column
    target: Column
    source: Column
    slot: Column
    expert: Column


@attrs.frozen(eq=False)
class Loads:
    """Rows that come from a copy outside of the group: sorted by layer, target, expert."""

    layer: Column
    target: Column
    expert: Column


@attrs.frozen(eq=False)
class Copies:
    """Rows that move within a rank: sorted by layer, rank, and then in the order in which they must be made."""

    layer: Column
    rank: Column
    start: Column
    end: Column


@attrs.frozen(eq=False)
class Writes:
    """Where what arrived goes: sorted by layer, rank, slot. `arrival` counts the rank's fetches, then its loads."""

    layer: Column
    rank: Column
    arrival: Column
    slot: Column


@attrs.frozen(eq=False)
class Moves:
    """All that moves between two placements."""

    fetches: Fetches
    loads: Loads
    copies: Copies
    writes: Writes
    #: How many rows arrive, and whether a temporary one is needed besides: [layers, ranks].
    arriving: Column
    temporary: NDArray[np.bool_]


@attrs.frozen(eq=False)
class _Held:
    """Which slot of a rank is read for an expert that it holds: the lowest that keeps its row, or else the lowest."""

    #: (layer, rank, expert) as one number, ascending, each once.
    key: Column
    slot: Column


@attrs.frozen(eq=False)
class _Wanted:
    """Slots that get another expert: sorted by layer, rank, expert, slot."""

    key: Column
    slot: Column


def moves(old: Placement, new: Placement, topology: Topology, excluded: Collection[int]) -> Moves:
    """What moves. An expert that no rank holds that may send it is among the loads, whether there is a copy or not."""
    ranks, slots, experts = old.ranks, old.slots, old.num_logical
    wanted, held = _wanted_and_held(old, new)
    place = np.searchsorted(held.key, wanted.key)
    here = np.zeros(len(place), dtype=bool)
    inside = place < len(held.key)
    here[inside] = held.key[place[inside]] == wanted.key[inside]
    at, end = wanted.key[here] // experts, wanted.slot[here]
    copies, temporary = _copies(at, held.slot[place[here]], end, slots, old.layers * ranks)
    at, start, end = copies
    split = Copies(at // ranks, at % ranks, start, end)
    arriving, first = np.unique(wanted.key[~here], return_inverse=True)
    source, slot = _sources(arriving, held, old, topology, excluded)
    fetches, loads, arrival = _arrivals(arriving, source, slot, ranks, experts)
    at = wanted.key[~here] // experts
    order = np.argsort(at * slots + wanted.slot[~here])
    at = at[order]
    writes = Writes(at // ranks, at % ranks, arrival[first][order], wanted.slot[~here][order])
    counts = np.bincount(arriving // experts, minlength=old.layers * ranks).astype(np.int64)
    shape = (old.layers, ranks)
    return Moves(fetches, loads, split, writes, counts.reshape(shape), temporary.reshape(shape))


def _wanted_and_held(old: Placement, new: Placement) -> tuple[_Wanted, _Held]:
    ranks, slots, experts = old.ranks, old.slots, old.num_logical
    moved = (old.map != new.map) & (new.map != EMPTY)
    layer, position = np.nonzero(moved)
    expert = new.map[layer, position].astype(np.int64)
    packed = np.sort(((layer * ranks + position // slots) * experts + expert) * slots + position % slots)
    wanted = _Wanted(packed // slots, packed % slots)
    # Of what is held only experts that move count: in a small step these are few.
    asked = np.zeros((old.layers, experts + 1), dtype=bool)  # the last column is what EMPTY, -1, points to
    asked[layer, expert] = True
    layer, position = np.nonzero(np.take_along_axis(asked, old.map.astype(np.int64), axis=1))
    expert = old.map[layer, position].astype(np.int64)
    key = (layer * ranks + position // slots) * experts + expert
    packed = np.sort((key * 2 + moved[layer, position]) * slots + position % slots)
    key = packed // (2 * slots)
    kept = np.ones(len(key), dtype=bool)
    kept[1:] = key[1:] != key[:-1]
    return wanted, _Held(key[kept], packed[kept] % slots)


# -- within a rank


def _copies(
    at: Column, start: Column, end: Column, slots: int, groups: int
) -> tuple[tuple[Column, Column, Column], NDArray[np.bool_]]:
    """Bring copies into an order in which no row is overwritten that is still to be read.

    `at` is layer and rank as one number. A slot is written when nobody reads it any more; what is left when no such
    slot is left are cycles, and each is opened by putting one row aside.
    """
    source, target = at * slots + start, at * slots + end
    reads = np.bincount(source, minlength=groups * slots)
    turn = np.zeros(len(at), dtype=np.int64)
    pending, step = np.arange(len(at)), 0
    while len(pending):
        ready = reads[target[pending]] == 0
        if not ready.any():
            break
        done, pending = pending[ready], pending[~ready]
        turn[done] = step
        np.subtract.at(reads, source[done], 1)
        step += 1
    temporary = np.zeros(groups, dtype=bool)
    if not len(pending):
        order = np.argsort((at * (step + 1) + turn) * slots + end)
        return (at[order], start[order], end[order]), temporary
    temporary[at[pending]] = True
    opened = np.array(_opened(source[pending].tolist(), target[pending].tolist(), slots), dtype=np.int64).T
    rest = np.ones(len(at), dtype=bool)
    rest[pending] = False
    every = np.concatenate([at[rest], opened[0]])
    order = np.lexsort((np.concatenate([turn[rest], step + np.arange(opened.shape[1])]), every))
    starts, ends = np.concatenate([start[rest], opened[1]]), np.concatenate([end[rest], opened[2]])
    return (every[order], starts[order], ends[order]), temporary


def _opened(sources: list[int], targets: list[int], slots: int) -> list[tuple[int, int, int]]:
    """Cycles as copies: put the row of the lowest slot aside, go round, and write the row that was put aside last."""
    read = dict(zip(targets, sources, strict=True))
    made = []
    for lowest in sorted(read):
        if lowest not in read:
            continue  # part of a cycle that was resolved
        at = lowest // slots
        made.append((at, lowest % slots, TEMPORARY))
        slot = lowest
        while (source := read.pop(slot)) != lowest:
            made.append((at, source % slots, slot % slots))
            slot = source
        made.append((at, TEMPORARY, slot % slots))
    return made


# -- between ranks


def _sources(
    arriving: Column, held: _Held, old: Placement, topology: Topology, excluded: Collection[int]
) -> tuple[Column, Column]:
    """For each (layer, rank, expert) that arrives the rank that sends it, or -1, and the slot in which that has it.

    Holders are sorted by node, so that those of one node, like all of them, are one range of a list.
    """
    ranks, slots, experts = old.ranks, old.slots, old.num_logical
    nodes = np.unique(np.asarray(topology.nodes), return_inverse=True)[1].reshape(-1)
    by_node = np.argsort(nodes, kind="stable")
    place = np.argsort(by_node)
    rank = held.key // experts % ranks
    allowed = ~np.isin(rank, list(excluded))
    thing = held.key // (experts * ranks) * experts + held.key % experts  # layer and expert
    packed = np.sort(((thing * ranks + place[rank]) * slots + held.slot)[allowed])
    holders, holder_slot = packed // slots, packed % slots
    layer, target = arriving // (experts * ranks), arriving // experts % ranks
    thing = layer * experts + arriving % experts
    sizes = np.bincount(nodes)
    after = np.cumsum(sizes)
    near = after[nodes[target]]
    low = np.searchsorted(holders, thing * ranks + near - sizes[nodes[target]])
    high = np.searchsorted(holders, thing * ranks + near)
    far = np.flatnonzero(low == high)
    low[far] = np.searchsorted(holders, thing[far] * ranks)
    high[far] = np.searchsorted(holders, (thing[far] + 1) * ranks)
    who = by_node[holders % ranks]
    chosen = np.where(high > low, low, -1)
    several = np.flatnonzero(high - low > 1)
    if len(several):
        single = np.flatnonzero(high - low == 1)
        served = np.bincount(layer[single] * ranks + who[low[single]], minlength=old.layers * ranks)
        several = several[np.lexsort((arriving[several], thing[several], (high - low)[several], layer[several]))]
        chosen[several] = _spread(
            layer[several].tolist(), low[several].tolist(), high[several].tolist(), who.tolist(),
            served.reshape(old.layers, ranks).astype(np.int64), len(arriving) + 1,
        )  # fmt: skip
    found = chosen >= 0
    source, slot = (np.full(len(arriving), -1, dtype=np.int64) for _ in range(2))
    source[found], slot[found] = who[chosen[found]], holder_slot[chosen[found]]
    return source, slot


def _spread(layers: list[int], low: list[int], high: list[int], who: list[int], served: Column, most: int) -> list[int]:
    """For each row with several holders, `who[low:high]`, the one that sends least: in the layer, and then in all.

    What a rank sends is one number in which the layer's rows weigh `most` times as much as those of all layers; the
    lowest rank wins a tie because its own number is added.
    """
    ranks = served.shape[1]
    total, by_layer = served.sum(axis=0).tolist(), served.tolist()
    chosen, now, load = [], -1, [0] * ranks
    for layer, first, last in zip(layers, low, high, strict=True):
        if layer != now:
            now, both = layer, zip(by_layer[layer], total, strict=True)
            load = [(mine * most + every) * ranks + rank for rank, (mine, every) in enumerate(both)]
        best, rank = first, who[first]
        for index in range(first + 1, last):
            if load[who[index]] < load[rank]:
                best, rank = index, who[index]
        load[rank] += (most + 1) * ranks
        total[rank] += 1
        chosen.append(best)
    return chosen


def _arrivals(
    arriving: Column, source: Column, slot: Column, ranks: int, experts: int
) -> tuple[Fetches, Loads, Column]:
    """The tables of what arrives, and for each entry of `arriving` how many arrive before it at its rank."""
    at, expert = arriving // experts, arriving % experts
    turn = np.where(source >= 0, (source - at) % ranks, ranks)  # `at` and the rank are equal modulo ranks
    order = np.argsort((at * (ranks + 1) + turn) * experts + expert)
    arrival = np.empty(len(order), dtype=np.int64)
    arrival[order] = np.arange(len(order)) - np.searchsorted(at[order], at[order])
    layer, target = at // ranks, at % ranks
    fetched, loaded = order[source[order] >= 0], order[source[order] < 0]
    fetches = Fetches(layer[fetched], target[fetched], source[fetched], slot[fetched], expert[fetched])
    return fetches, Loads(layer[loaded], target[loaded], expert[loaded]), arrival
