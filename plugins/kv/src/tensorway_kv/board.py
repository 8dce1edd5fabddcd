"""The generation board: a word beside each block, which says whether a reader was in time.

May import the core. `leases.Generations` decides which words; here they get into memory that peers can read, and a
reader's copies get a meaning. A word is the epoch under which a block is held, or, with the highest bit, the last epoch
that was granted before it was let go: so a reader tells `not yet` from `too late`, which one word for both could not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

from tensorway import memory
from tensorway.memory import Region
from tensorway.transport import BlockTable
from tensorway_kv.orders import Ids, Mark

WORD: Final = 8
_LET_GO: Final = 1 << 63

#: `good`: the block was held all the time. `early`: its word is not written yet. `late`: it was given away.
Verdict = Literal["good", "early", "late"]


def let_go(last: int) -> int:
    """The word of a block that nobody holds any more, when `last` was the last epoch that was granted."""
    return _LET_GO | last


def verdict(word: int, epoch: int) -> Verdict:
    """What a word says to the reader of a lease. A block that leases share has the first one's epoch."""
    if word & _LET_GO:
        return "late" if word & ~_LET_GO >= epoch else "early"
    if not word:
        return "early"
    return "good" if word <= epoch else "late"


class Board:
    """The words of one rank: those of its first group's blocks, then those of the next."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = tuple(blocks)
        self._buffer = memory.shared(max(sum(blocks), 1) * WORD)
        self._words = self._buffer.cast("Q")

    @property
    def region(self) -> Region:
        """Its memory, to be registered."""
        return Region.of(self._buffer)

    def write(self, mark: Mark) -> None:
        """Write a word beside blocks; those of groups that this rank holds nothing of are passed over."""
        for ids, count, first in zip(mark.blocks, self._blocks, starts(self._blocks), strict=False):
            for block in ids:
                if block < count:
                    self._words[first + block] = mark.word

    def holds(self, blocks: Ids, epoch: int) -> bool:
        """Whether all of these blocks that are here are held since then, or longer."""
        return all(
            verdict(self._words[first + block], epoch) == "good"
            for ids, count, first in zip(blocks, self._blocks, starts(self._blocks), strict=False)
            for block in ids
            if block < count
        )


class Scratch:
    """Where copies of words arrive: so many places, each for one look at a time."""

    def __init__(self, places: int = 64, words: int = 4096) -> None:
        self.words = words
        self._buffer = memory.shared(places * words * WORD)
        self._view = self._buffer.cast("Q")
        self._free = list(range(places))

    @property
    def region(self) -> Region:
        """Its memory, to be registered."""
        return Region.of(self._buffer)

    @property
    def table(self) -> BlockTable:
        """All words of all places, as blocks."""
        return BlockTable.over(self.region, WORD)

    def take(self) -> int | None:
        """A place; None while all are in use."""
        return self._free.pop() if self._free else None

    def give(self, place: int) -> None:
        """A place back; nothing may be written to it any more."""
        self._free.append(place)

    def ids(self, place: int, count: int) -> range:
        """The first words of a place, as blocks of the table."""
        return range(place * self.words, place * self.words + count)

    def read(self, place: int, count: int) -> list[int]:
        """What arrived."""
        first = place * self.words
        return self._view[first : first + count].tolist()


def starts(blocks: Iterable[int]) -> list[int]:
    """With which word each group begins."""
    out, first = [], 0
    for count in blocks:
        out.append(first)
        first += count
    return out
