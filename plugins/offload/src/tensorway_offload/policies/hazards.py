"""When blocks come back: learned from the ends of prompts, by class. May import the offload room.

A prompt that goes on from another begins with all of its blocks, so the last blocks of a prompt tell when all of it
came back, and what did not come back yet is known to have waited so long. That gives, for each class of prompts and
each age, the chance that it comes back soon: a hazard. What it is worth to keep a block of this class at this age is
the most hits for room and time that keeping it for any while brings: its Gittins index.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from tensorway.offload import OffloadKey

#: Classes are words of turn, growth and length; of fewer words for what classes have in common.
Class = tuple[int, ...]
#: Ages in requests at which buckets begin: four of them for each doubling.
EDGES: Final = tuple(sorted({math.ceil(16 * (2 ** (at / 4) - 1)) for at in range(37)}))
_WIDTHS: Final = tuple(float(end - start) for start, end in zip(EDGES, (*EDGES[1:], EDGES[-1] * 2), strict=True))
#: What has waited longer than this is not waited for any more.
HORIZON: Final = EDGES[-1] + 1
#: Prompts whose end is remembered, at most.
_ENDS: Final = HORIZON
#: Until this much was seen of a class, it is taken for what its parent class is.
_TRUST: Final = 30.0
#: A chance of two per cent in 4,000 requests, before anything was seen.
_LEAST: Final = 0.02 / 4000
#: Of what was seen so many requests ago, half counts.
_HALF: Final = 20_000


@attrs.define(eq=False)
class Table:
    """What was seen of one class, and what follows from it."""

    parent: Table | None
    #: By age: blocks that came back, and blocks that had not come back when they were as old.
    back: list[float] = attrs.field(factory=lambda: [0.0] * len(EDGES))
    exposed: list[float] = attrs.field(factory=lambda: [0.0] * len(EDGES))
    hazard: list[float] = attrs.field(factory=lambda: [0.0] * len(EDGES))
    index: list[float] = attrs.field(factory=lambda: [1.0 / (16 + edge) for edge in EDGES])
    #: When it was made to forget last.
    faded: int = 0

    def value(self, age: int) -> float:
        """What keeping a block of this class is worth, at this age in requests."""
        return self.index[bisect_right(EDGES, age) - 1]

    def refresh(self, now: int, weight: float) -> None:
        """Bring hazards and index up to date; `weight` is how many blocks a prompt has."""
        if now > self.faded:
            left = 0.5 ** ((now - self.faded) / _HALF)
            self.back = [value * left for value in self.back]
            self.exposed = [value * left for value in self.exposed]
            self.faded = now
        self.hazard = self._hazard(weight)
        self.index = _index(self.hazard)

    def _hazard(self, weight: float) -> list[float]:
        if self.parent is None:
            rows = zip(self.back, self.exposed, _WIDTHS, strict=True)
            return [min(0.9, (back + width * _LEAST) / (exposed + 1.0)) for back, exposed, width in rows]
        trust = _TRUST * weight
        expected = sum(map(float.__mul__, self.exposed, self.parent.hazard))
        # First how often it comes back at all, as a factor; then when, as far as enough was seen.
        factor = (sum(self.back) + 0.3 * trust) / (expected + 0.3 * trust)
        own = [min(0.9, hazard * factor) for hazard in self.parent.hazard]
        rows = zip(self.back, self.exposed, own, strict=True)
        return [(back + trust * hazard) / (exposed + trust) for back, exposed, hazard in rows]


def _index(hazard: Sequence[float]) -> list[float]:
    """The Gittins index at each age: the highest rate of hits that stopping at any later age gives.

    From the oldest age on, an age joins the next one as long as that one's rate is higher.
    """
    alive, rows = 1.0, []
    for chance, width in zip(hazard, _WIDTHS, strict=True):
        rows.append((alive * chance, alive * width * (1 - chance / 2)))
        alive *= 1 - chance
    stack: list[tuple[float, float]] = []
    index = [0.0] * len(rows)
    for at in range(len(rows) - 1, -1, -1):
        hits, time = rows[at]
        while stack and stack[-1][0] * time > hits * stack[-1][1]:
            more, longer = stack.pop()
            hits, time = hits + more, time + longer
        stack.append((hits, time))
        index[at] = hits / time if time else 0.0
    return index


@attrs.define(eq=False)
class _End:
    """A prompt that may be gone on from."""

    at: int
    turn: int
    weight: float
    tables: tuple[Table, ...]
    keys: tuple[OffloadKey, ...]
    open: bool = True


class Hazards:
    """Classes of prompts, and what is known of each."""

    def __init__(self) -> None:
        self.now = 0
        self._root = Table(None)
        self._root.refresh(0, 1.0)
        self._tables: dict[Class, Table] = {(): self._root}
        self._queue: list[Table] = []
        self._ends: dict[OffloadKey, _End] = {}
        self._ring: list[_End | None] = [None] * HORIZON
        self._length = 16.0
        #: Of prompts that were gone on from: at all, and those of them that were with their very last block.
        self._gone_on, self._whole = 0.0, 0.0

    @property
    def root(self) -> Table:
        """What holds for all classes."""
        return self._root

    def ended(self, keys: Sequence[OffloadKey]) -> Table:
        """A prompt has ended: learn from what it goes on from; its class."""
        self.now += 1
        turn, gap, new = self._gone_on_from(keys)
        self._length += (len(keys) - self._length) / min(1000, self.now + 10)
        tables = self._of(_class(turn, gap, new, len(keys)))
        self._wait(
            _End(self.now, turn, float(len(keys)), tables, tuple(keys[-1:-3:-1] if len(keys) > 2 else keys[-1:]))
        )
        self._expose()
        if not self._queue:
            self._queue = sorted(self._tables.values(), key=lambda table: -_depth(table))
        self._queue.pop().refresh(self.now, self._length)
        return tables[-1]

    def cuts_last(self) -> bool:
        """Whether the last block of a prompt is one that nobody goes on from, since it was cut in the middle."""
        return self._gone_on >= 30 and self._whole < 0.05 * self._gone_on

    def _gone_on_from(self, keys: Sequence[OffloadKey]) -> tuple[int, int, int]:
        """Which turn of a conversation it is, how long ago the last one was, and how many blocks are new."""
        ends = self._ends
        for at in range(len(keys) - 1, -1, -1):
            end = ends.get(keys[at])
            if end is None:
                continue
            self._forget(end)
            age = self.now - end.at
            bucket = bisect_right(EDGES, age) - 1
            for table in end.tables:
                table.back[bucket] += end.weight
            if len(end.keys) > 1:
                self._gone_on += 1
                self._whole += keys[at] == end.keys[0]
            return end.turn + 1, age, len(keys) - 1 - at
        return 0, 0, len(keys)

    def _wait(self, end: _End) -> None:
        slot = end.at % HORIZON
        before = self._ring[slot]
        if before is not None:
            self._forget(before)
        self._ring[slot] = end
        for key in end.keys:
            other = self._ends.get(key)
            if other is not None:
                self._forget(other)
            self._ends[key] = end

    def _forget(self, end: _End) -> None:
        end.open = False
        for key in end.keys:
            if self._ends.get(key) is end:
                del self._ends[key]

    def _expose(self) -> None:
        """Those that are as old as an edge today have not come back so far."""
        for bucket, edge in enumerate(EDGES):
            end = self._ring[(self.now - edge) % HORIZON] if edge < self.now else None
            if end is not None and end.open and end.at == self.now - edge:
                for table in end.tables:
                    table.exposed[bucket] += end.weight

    def _of(self, words: Class) -> tuple[Table, ...]:
        """The tables of a class, what is common to all first."""
        found = [self._root]
        for depth in (1, len(words)):
            table = self._tables.get(words[:depth])
            if table is None:
                table = self._tables[words[:depth]] = Table(found[-1], faded=self.now)
                table.refresh(self.now, self._length)
            found.append(table)
        return tuple(found)


def _depth(table: Table) -> int:
    return 0 if table.parent is None else 1 + _depth(table.parent)


def _class(turn: int, gap: int, new: int, length: int) -> Class:
    """Turn, growth and length of a prompt, each by powers of two."""
    if not turn:
        return (0, 0, min(7, length.bit_length() - 1))
    return (min(5, turn.bit_length()), min(5, max(1, new).bit_length()), min(7, length.bit_length() - 1))
