"""The routes from one rank to one producer rank: tables for whatever a request may want, and how its blocks name it.

May import the core, attrs, numpy and this package's mathematics. Made once; a request only does arithmetic on ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import attrs
import numpy as np

from tensorway.kv import Plane, RankGeometry
from tensorway.transport.blocks import BlockTable
from tensorway_kv.intersect import MAX_ROWS, Box, Meeting, Numbers, Pattern, Runs, normal, pattern, rows
from tensorway_kv.sources import Pages
from tensorway_kv.tables import Column, Room, units

#: The tables of a route: local, remote.
Tables: TypeAlias = tuple[BlockTable, BlockTable]


@attrs.frozen(eq=False)
class Side:
    """One side of a track: which block of the period each unit lies in, and which unit of that block's page it is."""

    blocks: int
    block: Numbers
    add: Numbers
    scale: int

    def ids(self, held: Numbers, first: int, periods: Numbers, chosen: slice) -> Numbers:
        """The units' ids in these periods; units of blocks that are not held have any id."""
        if len(self.block) == 1 and self.blocks == 1:
            ids = held[int(periods[0]) - first : int(periods[-1]) + 1 - first]
        else:
            ids = held.take(periods[:, None] * self.blocks + (self.block[chosen] - first), mode="clip")
        if self.scale != 1:
            ids = ids * self.scale
        add = self.add[chosen]
        if add.any():
            ids = ids + (add if ids.ndim > 1 else add[0])
        return ids.ravel()


@attrs.frozen(eq=False)
class Track:
    """Units of one route. `starts` says for each step which unit is its first, and how many units there are."""

    route: int
    starts: Numbers
    own: Side
    theirs: Side


@attrs.frozen(eq=False)
class Kind:
    """Pairs of pages that meet alike in equally spaced memory: what is said of one is said of all, by one id."""

    own_group: int
    their_group: int
    #: Whether it is of the whole sequence, and has no tokens.
    state: bool
    meeting: Meeting
    #: How many pages there are on either side.
    own_pages: int
    their_pages: int
    whole: list[Track]
    single: list[Track]


@attrs.frozen
class _Place:
    """Where the first byte of a pattern is in a plane."""

    plane: Plane
    offset: int

    @property
    def address(self) -> int:
        """Of its first page."""
        return self.plane.base + self.offset

    @property
    def nbytes(self) -> int:
        """From there to the end of the plane."""
        return self.plane.region.nbytes - self.offset

    @property
    def shape(self) -> tuple[int, int, str]:
        """What planes of one table have in common."""
        return self.plane.stride, self.plane.pages, self.plane.device


class Routes:
    """All routes to one producer rank."""

    def __init__(self, met: Sequence[Pages], own: RankGeometry, theirs: RankGeometry) -> None:
        self.tables: list[Tables] = []
        self.kinds: list[Kind] = []
        self._numbers: dict[Tables, int] = {}
        alike: dict[object, tuple[Pages, Pattern, list[tuple[_Place, _Place]]]] = {}
        for pages in met:
            for own_offset, their_offset, shape in _patterns(pages):
                here = _Place(own.planes[pages.own_plane], own_offset)
                there = _Place(theirs.planes[pages.their_plane], their_offset)
                # Patterns are cached by what they are made of, and stay alive here: equal ones are one object.
                key = id(shape), pages.own_group, pages.their_group, here.shape, there.shape
                alike.setdefault(key, (pages, shape, []))[2].append((here, there))
        for pages, shape, places in alike.values():
            self.kinds.append(self._kind(pages, shape, places))

    def _kind(self, pages: Pages, shape: Pattern, places: list[tuple[_Place, _Place]]) -> Kind:
        steps = len(shape.meeting.begins), len(shape.meeting.positions)
        at_step = np.arange(steps[0]), shape.meeting.segments
        tracks = [
            list(self._tracks(shape.meeting, runs, count, segments, places))
            for runs, count, segments in zip((shape.whole, shape.single), steps, at_step, strict=True)
        ]
        own, theirs = places[0]
        return Kind(
            pages.own_group,
            pages.their_group,
            not pages.own.tokens,
            shape.meeting,
            own.plane.pages,
            theirs.plane.pages,
            *tracks,
        )

    def _tracks(
        self, meeting: Meeting, runs: Runs, steps: int, segments: Numbers, places: list[tuple[_Place, _Place]]
    ) -> Iterator[Track]:
        rooms = [
            Room(side[0].plane.stride, side[0].plane.pages, min(place.nbytes for place in side))
            for side in zip(*places, strict=True)
        ]
        for unit in units(runs, *rooms):
            columns = unit.own, unit.theirs
            own, theirs = (
                _table(side, column, unit.nbytes)
                for side, column in zip(zip(*places, strict=True), columns, strict=True)
            )
            at = segments[unit.step]
            yield Track(
                self._number((own, theirs)),
                unit.step.searchsorted(np.arange(steps + 1)),
                Side(meeting.own_blocks, meeting.own_block[at], unit.own_add, unit.own.scale),
                Side(meeting.their_blocks, meeting.their_block[at], unit.their_add, unit.theirs.scale),
            )

    def _number(self, tables: Tables) -> int:
        if tables not in self._numbers:
            self._numbers[tables] = len(self.tables)
            self.tables.append(tables)
        return self._numbers[tables]


def _table(places: Sequence[_Place], column: Column, nbytes: int) -> BlockTable:
    bases = tuple(place.address + column.offset for place in places)
    return BlockTable(bases, nbytes, column.stride, column.count, places[0].plane.device)


def _patterns(pages: Pages) -> Iterator[tuple[int, int, Pattern]]:
    """Where patterns begin on either side: one for each layer, unless bytes of several layers are neighbors."""
    apart = [_pattern(pages, boxes) for boxes in pages.layers.values()]
    together = [box for boxes in pages.layers.values() for box in boxes]
    if len(apart) > 1 and rows(pages.own, pages.theirs, together) <= MAX_ROWS:
        whole = _pattern(pages, together)
        if len(whole[2].whole) < sum(len(one.whole) for _, _, one in apart):
            apart = [whole]
    yield from apart


def _pattern(pages: Pages, boxes: list[Box]) -> tuple[int, int, Pattern]:
    own, theirs, moved = normal(boxes)
    return own, theirs, pattern(pages.own, pages.theirs, moved)
