"""What one request reads: from each producer rank a few batches of block ids over tables that all requests share.

May import the core, attrs, numpy and this package's mathematics. All work that depends on shapes is done when a `Reads`
is made; a request costs a few array operations for each table, and no step of Python for a block or a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import attrs
import numpy as np

from tensorway.errors import MemoryInvalid
from tensorway.kv import Group
from tensorway_kv.intersect import Meeting, Numbers
from tensorway_kv.routes import Kind, Routes, Tables, Track
from tensorway_kv.sources import Piece, by_pages
from tensorway_kv.topology import TransferTopology


@attrs.frozen
class Held:
    """The blocks that a request has on one side: ids for each cache group, in the order of its tokens.

    A list may begin later than the request does, as a sliding window's does; `first` says with which block. Of a state
    the last id counts.
    """

    blocks: Sequence[Sequence[int] | Numbers]
    first: Sequence[int] = ()

    @classmethod
    def ending(cls, blocks: Sequence[Sequence[int]], tokens: int, groups: Sequence[Group]) -> Held:
        """Lists that are shorter than so many tokens need are of their last blocks, as those of a sliding window."""
        counts = [-(-tokens // group.block_tokens) if group.block_tokens else 0 for group in groups]
        return cls(blocks, [max(0, count - len(ids)) for ids, count in zip(blocks, counts, strict=False)])

    def lists(self, whose: str) -> list[tuple[Numbers, int]]:
        """For each group its ids, a copy, and which block the first of them is."""
        if len(self.first) > len(self.blocks) or min(self.first, default=0) < 0:
            raise _ids_invalid(whose, f"The lists of {len(self.blocks)} groups begin with blocks {self.first}.")
        begins = [*self.first, *[0] * (len(self.blocks) - len(self.first))]
        return [(_whole_numbers(ids, whose), begin) for ids, begin in zip(self.blocks, begins, strict=True)]


@attrs.frozen(eq=False)
class Batch:
    """Blocks to be read over one route: `route` counts `Reads.routes` of the producer rank."""

    route: int
    local: Numbers
    remote: Numbers


class Reads:
    """How one rank reads from one engine; made once, used for all requests."""

    def __init__(self, topology: TransferTopology, engine: str, producers: Collection[int] | None = None) -> None:
        """`producers`: of what ranks; all by default."""
        self._remote, self._own = topology.remote(engine), topology.ranks[topology.rank]
        if producers is not None:
            sources = {rank: taken for rank, taken in self._remote.sources.items() if rank in producers}
            self._remote = attrs.evolve(self._remote, sources=sources)
        self.engine, self.incarnation = engine, self._remote.info.incarnation
        self._groups = self._own.groups
        self._alone: dict[int, Reads] = {}
        self._routes = self._to_read(lambda piece: True)

    def _to_read(self, wanted: Callable[[Piece], bool]) -> dict[int, Routes]:
        """Routes to the ranks that have something of what is wanted."""
        chosen = {producer: list(filter(wanted, taken)) for producer, taken in self._remote.sources.items()}
        ranks = self._remote.info.ranks
        return {
            producer: Routes(by_pages(self._own, ranks[producer], taken), self._own, ranks[producer])
            for producer, taken in chosen.items()
            if taken
        }

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that this rank has, in their order."""
        return tuple(sorted({part.layer for plane in self._own.planes for part in plane.parts}))

    def layer(self, number: int) -> Reads:
        """The same of one layer alone: more tables and more pieces, for who sends or awaits layers one by one."""
        if number not in self._alone:
            alone = copy.copy(self)
            alone._alone, alone._routes = {}, self._to_read(lambda piece: piece.own.part.layer == number)
            self._alone[number] = alone
        return self._alone[number]

    @property
    def producers(self) -> tuple[int, ...]:
        """The producer ranks that anything is ever read from."""
        return tuple(self._routes)

    def routes(self, producer: int) -> tuple[Tables, ...]:
        """The tables of all routes to a producer rank, whatever is requested."""
        return tuple(self._routes[producer].tables)

    def plan(
        self, own: Held, theirs: Held, start: int, stop: int, *, states: bool = True, clip: bool = False
    ) -> dict[int, list[Batch]]:
        """Read the tokens from `start` to before `stop`, exactly these, and, with `states`, states of the sequence.

        Of groups with a sliding window it is the window's last tokens. Whole blocks make fewer pieces than cut ones:
        who does not mind what lies behind the last token gives the end of its block for `stop`. With `clip`, tokens
        before those of a list that begins later are passed over, as long as there are any.
        """
        mine, its = own.lists("the reader"), theirs.lists("the producer")
        return {
            producer: _merged(
                [row for kind in routes.kinds for row in self._of_kind(kind, mine, its, start, stop, states, clip)]
            )
            for producer, routes in self._routes.items()
        }

    def _of_kind(
        self, kind: Kind, own: _Lists, theirs: _Lists, start: int, stop: int, states: bool, clip: bool
    ) -> Sequence[Batch]:
        meeting = kind.meeting
        ids, first = _of_group(own, kind.own_group, "the reader")
        their_ids, their_first = _of_group(theirs, kind.their_group, "the producer")
        if kind.state:
            start, stop = 0, int(states)
            ids, first, their_ids, their_first = ids[-1:], 0, their_ids[-1:], 0
        elif window := self._groups[kind.own_group].window:
            # The reader's list may begin behind that: then it has no need of what is before.
            start = max(start, stop - window, first * (meeting.period // meeting.own_blocks))
        if clip:
            begins = (
                first * (meeting.period // meeting.own_blocks),
                their_first * (meeting.period // meeting.their_blocks),
            )
            start = max(start, *begins)
        begin, end = _segments(meeting, start, stop)
        if begin >= end:
            return []
        last = end - 1
        _check(ids, first, _blocks(meeting.own_block, meeting.own_blocks, begin, last), kind.own_pages, "the reader")
        needed = _blocks(meeting.their_block, meeting.their_blocks, begin, last)
        _check(their_ids, their_first, needed, kind.their_pages, "the producer")
        held = ids, first, their_ids, their_first
        cut = sorted({edge for edge in (begin, last) if _cut(meeting, edge, start, stop)})
        batches = [batch for edge in cut for batch in _single(kind, edge, start, stop, held)]
        begin += begin in cut
        end -= last in cut and end > begin
        return batches + _whole(kind, begin, end, held) if begin < end else batches


_Lists: TypeAlias = Sequence[tuple[Numbers, int]]
#: Of one group: ids and first block of the reader, and of the producer.
_Held: TypeAlias = tuple[Numbers, int, Numbers, int]


def _segments(meeting: Meeting, start: int, stop: int) -> tuple[int, int]:
    """The first segment with a position from `start` on, and behind the last with one before `stop`."""
    if start >= stop:
        return 0, 0
    each = len(meeting.begins)
    period, rest = divmod(start, meeting.period)
    begin = period * each + int(meeting.ends.searchsorted(rest, "right"))
    period, rest = divmod(stop, meeting.period)
    return begin, period * each + int(meeting.begins.searchsorted(rest, "left"))


def _cut(meeting: Meeting, segment: int, start: int, stop: int) -> bool:
    """Whether only some of a segment's positions are wanted."""
    period, index = divmod(segment, len(meeting.begins))
    origin = period * meeting.period
    return bool(origin + meeting.begins[index] < start or origin + meeting.ends[index] > stop)


def _blocks(block: Numbers, each: int, begin: int, last: int) -> tuple[int, int]:
    """The first and the last block that segments of a request lie in."""
    first, last = (
        period * each + int(block[index]) for period, index in (divmod(one, len(block)) for one in (begin, last))
    )
    return first, last


def _check(ids: Numbers, first: int, needed: tuple[int, int], pages: int, whose: str) -> None:
    begin, last = needed
    if begin < first or last - first >= len(ids):
        have = f"It has blocks {first} to {first + len(ids) - 1}" if len(ids) else "It has no blocks"
        raise _ids_invalid(whose, f"{have}; blocks {begin} to {last} are needed.")
    used = ids[begin - first : last + 1 - first]
    low, high = int(used.min()), int(used.max())
    if low < 0 or high >= pages:
        raise _ids_invalid(whose, f"Its ids reach from {low} to {high}; there are {pages} pages.")


def _whole(kind: Kind, begin: int, end: int, held: _Held) -> list[Batch]:
    """Segments of which everything is wanted."""
    each, batches = len(kind.meeting.begins), []
    first, (final, stop) = begin // each, divmod(end, each)
    periods = np.arange(first, final + bool(stop), dtype=np.int64)
    for track in kind.whole:
        count = int(track.starts[-1])
        wanted = slice(
            int(track.starts[begin % each]), (final - first) * count + (int(track.starts[stop]) if stop else 0)
        )
        if wanted.start < wanted.stop:
            batches.append(_batch(track, periods, slice(None), wanted, held))
    return batches


def _single(kind: Kind, segment: int, start: int, stop: int, held: _Held) -> list[Batch]:
    """The wanted positions of one segment."""
    meeting, batches = kind.meeting, []
    period, index = divmod(segment, len(meeting.begins))
    origin = period * meeting.period
    low, high = max(start - origin, int(meeting.begins[index])), min(stop - origin, int(meeting.ends[index]))
    begin, end = meeting.positions.searchsorted([low, high], "left")
    periods = np.full(1, period, np.int64)
    for track in kind.single:
        chosen = slice(int(track.starts[begin]), int(track.starts[end]))
        if chosen.start < chosen.stop:
            batch = _batch(track, periods, chosen, slice(None), held)
            order = batch.local.argsort(kind="stable")  # tokens of one head are neighbors, and can be one piece
            batches.append(Batch(batch.route, batch.local[order], batch.remote[order]))
    return batches


def _batch(track: Track, periods: Numbers, chosen: slice, wanted: slice, held: _Held) -> Batch:
    ids, first, their_ids, their_first = held
    local = track.own.ids(ids, first, periods, chosen)[wanted]
    return Batch(track.route, local, track.theirs.ids(their_ids, their_first, periods, chosen)[wanted])


def _merged(batches: list[Batch]) -> list[Batch]:
    """One batch for each route."""
    by_route: dict[int, list[Batch]] = {}
    for batch in batches:
        by_route.setdefault(batch.route, []).append(batch)
    return [
        same[0]
        if len(same) == 1
        else Batch(route, np.concatenate([one.local for one in same]), np.concatenate([one.remote for one in same]))
        for route, same in by_route.items()
    ]


def _whole_numbers(ids: Sequence[int] | Numbers, whose: str) -> Numbers:
    try:
        given = np.asarray(ids)
    except ValueError as error:  # lists of unequal lengths
        raise _ids_invalid(whose, f"They are no list of numbers: {error}.") from error
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise _ids_invalid(whose, f"They are no whole numbers, but {given.ndim} dimensions of {given.dtype}.")
    return given.astype(np.int64)


def _of_group(lists: _Lists, group: int, whose: str) -> tuple[Numbers, int]:
    if group >= len(lists):
        raise _ids_invalid(whose, f"There are lists for {len(lists)} groups; group {group} is needed.")
    return lists[group]


def _ids_invalid(whose: str, true: str) -> MemoryInvalid:
    return MemoryInvalid(
        f"Blocks of {whose} were given for a request.", true, "Give the ids of all blocks that the tokens lie in."
    )
