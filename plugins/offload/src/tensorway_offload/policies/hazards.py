"""When blocks come back: learned from the ends of prompts, by class. May import the offload room.

A prompt that goes on from another begins with all of its blocks, so the last blocks of a prompt tell when all of it
came back, and what did not come back yet is known to have waited so long. That gives, for each class of prompts and
each age, the chance that it comes back soon: a hazard. What it is worth to keep a block of this class at this age is
the most hits for room and time that keeping it for any while brings: its Gittins index.
"""

from __future__ import annotations

import itertools
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
#: Words of a class by turn, growth and length.
_WHOLE: Final = 3
#: How long ago the last turn was, in requests.
_GAPS: Final = (60, 150, 400, 1000)
#: Of what was seen so many requests ago, half counts.
_HALF: Final = 20_000


@attrs.frozen
class Prior:
    """What was seen before anything was seen. Empty, it expects what would be the least of everything."""

    #: Blocks of a prompt.
    length: float = 16.0
    #: By class: blocks of its prompts, and how many of them came back at each age; those of later ages are none.
    classes: Mapping[Class, tuple[float, tuple[float, ...]]] = attrs.field(factory=dict)

    @classmethod
    def parse(cls, text: str) -> Prior:
        """From words: the length, then `; CLASS : BLOCKS BACK BACK ...` for each class."""
        length, *rows = text.split(";")
        classes = {}
        for row in rows:
            words, numbers = row.split(":")
            blocks, *back = map(float, numbers.split())
            classes[tuple(map(int, words.split()))] = (blocks, tuple(back))
        return cls(float(length), classes)

    def seen(self, words: Class) -> tuple[list[float], list[float]]:
        """What had been seen of this class: what came back, and what had not by each age."""
        back, left = [0.0] * len(EDGES), 0.0
        for name, (blocks, came) in self.classes.items():
            if name == words or (len(words) < 2 and len(name) == _WHOLE and name[: len(words)] == words):
                left += blocks
                for at, count in enumerate(came):
                    back[at] += count
        exposed = list(itertools.accumulate(back[:-1], float.__sub__, initial=left))
        return back, exposed


def _unknown() -> list[float]:
    return [1.0 / (16 + edge) for edge in EDGES]


@attrs.define(eq=False)
class Table:
    """What was seen of one class, and what follows from it."""

    parent: Table | None
    #: By age: blocks that came back, and blocks that had not come back when they were as old.
    back: list[float] = attrs.field(factory=lambda: [0.0] * len(EDGES))
    exposed: list[float] = attrs.field(factory=lambda: [0.0] * len(EDGES))
    hazard: list[float] = attrs.field(factory=lambda: [0.0] * len(EDGES))
    index: list[float] = attrs.field(factory=_unknown)
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


@attrs.define(eq=False)
class Pair:
    """Prompts of two classes with one parent class: what each differs in from that one, taken together."""

    whole: Table
    gap: Table
    index: list[float] = attrs.field(factory=_unknown)

    def value(self, age: int) -> float:
        """What keeping a block of both classes is worth, at this age in requests."""
        return self.index[bisect_right(EDGES, age) - 1]

    def refresh(self) -> None:
        """Bring the index up to date with both tables."""
        common = self.gap.parent.hazard if self.gap.parent is not None else self.gap.hazard
        rows = zip(self.whole.hazard, self.gap.hazard, common, strict=True)
        self.index = _index([min(0.9, one * other / max(both, 1e-12)) for one, other, both in rows])


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

    def __init__(self, prior: Prior, forget: bool = True, horizon: int = HORIZON) -> None:
        """So many prompts are remembered until they are gone on from, `horizon` of them at most."""
        self._prior, self._forget_old = prior, forget
        self.now = 0
        #: Blocks of a prompt, of the last thousand.
        self.length = prior.length
        self._tables: dict[Class, Table] = {}
        self._pairs: dict[tuple[Class, Class], Pair] = {}
        self._root = self._table((), None)
        self._queue: list[Table] = []
        self._paired: list[Pair] = []
        self._ends: dict[OffloadKey, _End] = {}
        self._ring: list[_End | None] = [None] * min(horizon, HORIZON)
        #: Of prompts that were gone on from: at all, and those of them that were with their very last block.
        self._gone_on, self._whole = 0.0, 0.0

    @property
    def root(self) -> Table:
        """What holds for all classes."""
        return self._root

    def ended(self, keys: Sequence[OffloadKey]) -> Table | Pair:
        """A prompt has ended: learn from what it goes on from; its class."""
        self.now += 1
        turn, gap, new = self._gone_on_from(keys)
        self.length += (len(keys) - self.length) / min(1000, self.now + 10)
        words = _class(turn, gap, new, len(keys))
        gap_words = (words[0], bisect_right(_GAPS, gap))
        tables = self._of(words, gap_words)
        self._wait(
            _End(self.now, turn, float(len(keys)), tables, tuple(keys[-1:-3:-1] if len(keys) > 2 else keys[-1:]))
        )
        self._expose()
        self._refresh()
        return self._pair(words, gap_words) if turn else tables[-1]

    def _refresh(self) -> None:
        """One table and one pair; those that others are made of come before these."""
        if not self._queue:
            self._queue = sorted(self._tables.values(), key=lambda table: -_depth(table))
        table = self._queue.pop()
        if self._forget_old:
            table.fade(self.now)
        table.refresh(self.length)
        if not self._paired:
            self._paired = list(self._pairs.values())
        if self._paired:
            self._paired.pop().refresh()

    def seen(self) -> dict[Class, Table]:
        """All classes that are not made of others."""
        return {words: table for words, table in self._tables.items() if len(words) > 1}

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
        slot = end.at % len(self._ring)
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
            end = self._ring[(self.now - edge) % len(self._ring)] if edge < self.now else None
            if end is not None and end.open and end.at == self.now - edge:
                for table in end.tables:
                    table.exposed[bucket] += end.weight

    def _of(self, whole: Class, gap: Class) -> tuple[Table, ...]:
        """The tables of a class, what is common to all first; a first turn has no gap."""
        turn = self._tables.get(whole[:1]) or self._table(whole[:1], self._root)
        names = (whole, gap) if whole[0] else (whole,)
        return self._root, turn, *(self._tables.get(name) or self._table(name, turn) for name in names)

    def _pair(self, whole: Class, gap: Class) -> Pair:
        pair = self._pairs.get((whole, gap))
        if pair is None:
            pair = self._pairs[whole, gap] = Pair(self._tables[whole], self._tables[gap])
            pair.refresh()
        return pair

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
