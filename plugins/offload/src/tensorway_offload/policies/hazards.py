"""When blocks come back: learned from the ends of prompts, by class. May import the offload room.

A prompt that goes on from another begins with all of its blocks, so the last blocks of a prompt tell when all of it
came back, and what did not come back yet is known to have waited so long. That gives, for each class of prompts and
each age, the chance that it comes back soon: a hazard. What it is worth to keep a block of this class at this age is
the most hits for room and time that keeping it for any while brings: its Gittins index.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
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
#: Until this much was seen of a class, it is taken for what its parent class is.
_TRUST: Final = 30.0
#: A chance of two per cent in 4,000 requests, before anything was seen.
_LEAST: Final = 0.02 / 4000
#: What was expected before anything was seen counts as much as so many prompts.
_PRIOR_PROMPTS: Final = 3000
#: Of what was seen so many requests ago, half counts.
_HALF: Final = 20_000


@attrs.frozen
class Prior:
    """What is expected before anything was seen. Empty, it expects what would be the least of everything."""

    #: Blocks of a prompt.
    length: float = 16.0
    #: The hazard of all.
    hazard: tuple[float, ...] = ()
    #: By turn: its share of all, and its hazard.
    turns: Mapping[int, tuple[float, tuple[float, ...]]] = attrs.field(factory=dict)
    #: By class: its share of all, and by how much its hazard is that of its turn.
    classes: Mapping[Class, tuple[float, float]] = attrs.field(factory=dict)

    @classmethod
    def parse(cls, text: str) -> Prior:
        """From words: `length N all` and hazards, `turn N SHARE` and hazards, `class T G L SHARE FACTOR`."""
        words = iter(text.split())
        length = 16.0
        hazard: tuple[float, ...] = ()
        turns: dict[int, tuple[float, tuple[float, ...]]] = {}
        classes: dict[Class, tuple[float, float]] = {}
        for word in words:
            if word == "class":
                name = tuple(int(next(words)) for _ in range(3))
                classes[name] = (float(next(words)), float(next(words)))
                continue
            number, share = next(words), next(words)
            row = tuple(float(next(words)) for _ in EDGES)
            if word == "length":
                length, hazard = float(number), row
            else:
                turns[int(number)] = (float(share), row)
        return cls(length, hazard, turns, classes)

    def seen(self, words: Class) -> tuple[list[float], list[float]]:
        """As if so much had been seen of this class: what came back, and what had not by each age."""
        share, hazard = 1.0, self.hazard
        if words and words[0] in self.turns:
            share, hazard = self.turns[words[0]]
        if len(words) > 1:
            share, factor = self.classes.get(words, (0.0, 1.0))
            hazard = tuple(min(0.9, chance * factor) for chance in hazard)
        left = share * _PRIOR_PROMPTS * self.length if hazard else 0.0
        back, exposed = [0.0] * len(EDGES), [0.0] * len(EDGES)
        for at, chance in enumerate(hazard):
            back[at], exposed[at] = left * chance, left
            left *= 1 - chance
        return back, exposed


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

    def fade(self, now: int) -> None:
        """What was seen long ago counts less."""
        left = 0.5 ** ((now - self.faded) / _HALF)
        self.back = [value * left for value in self.back]
        self.exposed = [value * left for value in self.exposed]
        self.faded = now

    def refresh(self, weight: float) -> None:
        """Bring hazards and index up to date; `weight` is how many blocks a prompt has."""
        self.hazard = self._hazard(weight)
        self.index = _index(self.hazard)

    def often(self, trust: float) -> float:
        """How often it came back, by what its parent class makes expect; `trust` blocks' worth of evidence for 1."""
        expected = sum(map(float.__mul__, self.exposed, self.parent.hazard)) if self.parent is not None else 0.0
        return (sum(self.back) + trust) / (expected + trust)

    def _hazard(self, weight: float) -> list[float]:
        if self.parent is None:
            rows = zip(self.back, self.exposed, _WIDTHS, strict=True)
            return [min(0.9, (back + width * _LEAST) / (exposed + 1.0)) for back, exposed, width in rows]
        trust = _TRUST * weight
        # First how often it comes back at all, as a factor; then when, as far as enough was seen.
        factor = self.often(0.3 * trust)
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

    def __init__(self, prior: Prior, forget: bool = True) -> None:
        self._prior, self._forget_old = prior, forget
        self.now = 0
        #: Blocks of a prompt, of the last thousand.
        self.length = prior.length
        self._tables: dict[Class, Table] = {}
        self._root = self._table((), None)
        self._queue: list[Table] = []
        self._ends: dict[OffloadKey, _End] = {}
        self._ring: list[_End | None] = [None] * HORIZON
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
        self.length += (len(keys) - self.length) / min(1000, self.now + 10)
        tables = self._of(_class(turn, gap, new, len(keys)))
        self._wait(
            _End(self.now, turn, float(len(keys)), tables, tuple(keys[-1:-3:-1] if len(keys) > 2 else keys[-1:]))
        )
        self._expose()
        if not self._queue:
            self._queue = sorted(self._tables.values(), key=lambda table: -_depth(table))
        table = self._queue.pop()
        if self._forget_old:
            table.fade(self.now)
        table.refresh(self.length)
        return tables[-1]

    def settled(self) -> dict[Class, Table]:
        """All classes, each up to date with what is above it."""
        for table in sorted(self._tables.values(), key=_depth):
            table.refresh(self.length)
        return dict(self._tables)

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
        turn = self._tables.get(words[:1]) or self._table(words[:1], self._root)
        return self._root, turn, self._tables.get(words) or self._table(words, turn)

    def _table(self, words: Class, parent: Table | None) -> Table:
        table = self._tables[words] = Table(parent, *self._prior.seen(words), faded=self.now)
        table.refresh(self.length)
        return table


def _depth(table: Table) -> int:
    return 0 if table.parent is None else 1 + _depth(table.parent)


def _class(turn: int, gap: int, new: int, length: int) -> Class:
    """Turn, growth and length of a prompt, each by powers of two."""
    if not turn:
        return (0, 0, min(7, length.bit_length() - 1))
    return (min(5, turn.bit_length()), min(5, max(1, new).bit_length()), min(7, length.bit_length() - 1))
