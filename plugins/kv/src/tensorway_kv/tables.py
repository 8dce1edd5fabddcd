"""Runs as block tables: how few tables, and how few ids, say all runs of a pattern.

May import the core, numpy and this package's intersections. A table in units that divide all offsets takes any run, and
the transport joins neighbors; where no good unit exists, each place in a page has a table of its own.
"""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np

from tensorway.transport.blocks import MAX_BLOCKS
from tensorway_kv.intersect import Numbers, Runs

#: A table costs a request as much as so many ids in each period.
_TABLE_COSTS: Final = 32


@attrs.frozen
class Room:
    """The pages of one side, seen from the first byte that a pattern has there."""

    stride: int
    pages: int
    #: Bytes from there to the end of the last page.
    nbytes: int


@attrs.frozen
class Column:
    """One side of a table: page `p` of it is its blocks `p * scale` and following."""

    offset: int
    stride: int
    count: int
    scale: int


@attrs.frozen(eq=False)
class Units:
    """Blocks of one pair of tables that together are runs of a pattern."""

    nbytes: int
    own: Column
    theirs: Column
    #: For each block its step, and how many blocks behind the page's first it is on either side.
    step: Numbers
    own_add: Numbers
    their_add: Numbers


def units(runs: Runs, own: Room, theirs: Room) -> list[Units]:
    """The cheapest way to say these runs."""
    return _cheapest(runs, own, theirs)[1] if len(runs) else []


def _cheapest(runs: Runs, own: Room, theirs: Room) -> tuple[int, list[Units]]:
    unit = _unit(runs, own, theirs)
    lengths = np.unique(runs.nbytes)
    count = int(runs.nbytes.sum()) // unit
    fits = max(own.nbytes, theirs.nbytes) // unit < MAX_BLOCKS
    if fits and count == len(runs):  # no way is shorter, and tables of whole pages have neighbors
        return count + _TABLE_COSTS, [_in_units(runs, own, theirs, unit)]
    ways = [(len(runs) + _TABLE_COSTS * _places(runs), 0)]
    if fits:
        ways.append((count + _TABLE_COSTS, 1))
    if len(lengths) > 1 and len(lengths) * _TABLE_COSTS < min(ways)[0]:
        alone = [_cheapest(runs.select(runs.nbytes == length), own, theirs) for length in lengths]
        if (cost := sum(cost for cost, _ in alone)) < min(ways)[0]:
            return cost, [way for _, several in alone for way in several]
    cost, in_units = min(ways)
    return cost, [_in_units(runs, own, theirs, unit)] if in_units else _by_place(runs, own, theirs)


def _unit(runs: Runs, own: Room, theirs: Room) -> int:
    """The longest length that every run and every distance is a multiple of."""
    apart = np.concatenate([runs.nbytes, runs.own - runs.own.min(), runs.theirs - runs.theirs.min()])
    return int(np.gcd(np.gcd.reduce(apart), np.gcd(own.stride, theirs.stride)))


def _in_units(runs: Runs, own: Room, theirs: Room, unit: int) -> Units:
    each = runs.nbytes // unit
    run = np.repeat(np.arange(len(runs), dtype=np.int64), each)
    within = np.arange(len(run), dtype=np.int64) - np.repeat(np.cumsum(each) - each, each)
    begins = int(runs.own.min()), int(runs.theirs.min())
    columns = [
        Column(begin, unit, (room.nbytes - begin) // unit, room.stride // unit)
        for room, begin in zip((own, theirs), begins, strict=True)
    ]
    adds = [(at[run] - begin) // unit + within for at, begin in zip((runs.own, runs.theirs), begins, strict=True)]
    return Units(unit, columns[0], columns[1], runs.step[run], adds[0], adds[1])


def _places(runs: Runs) -> int:
    return len(np.unique(np.stack([runs.own, runs.theirs, runs.nbytes]), axis=1).T)


def _by_place(runs: Runs, own: Room, theirs: Room) -> list[Units]:
    """A table for each place in a page that runs have."""
    places, which = np.unique(np.stack([runs.own, runs.theirs, runs.nbytes]), axis=1, return_inverse=True)
    which, found = which.reshape(-1), []
    for index, (at, their_at, nbytes) in enumerate(places.T.tolist()):
        step = runs.step[which == index]
        columns = Column(at, own.stride, own.pages, 1), Column(their_at, theirs.stride, theirs.pages, 1)
        found.append(Units(nbytes, *columns, step, np.zeros_like(step), np.zeros_like(step)))
    return found
