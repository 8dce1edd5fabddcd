"""How two pages meet: which bytes of a reader's page are which bytes of a producer's, for one period of blocks.

May import the core and numpy. Tokens meet where both sides have the same positions, heads where their ranges overlap;
what is contiguous on both sides becomes one run. Patterns know no address: layers of one shape share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway.errors import Incompatible
from tensorway.kv import Part, RankGeometry

Numbers: TypeAlias = NDArray[np.int64]
#: Positions after which two block sizes must have met again.
MAX_PERIOD: Final = 1 << 20
#: Rows of bytes that one pattern may be made of before they are joined.
MAX_ROWS: Final = 1 << 20


@attrs.frozen
class Axis:
    """Which positions of a request a rank's pages hold, and in which order."""

    #: Of a page; 0 for a state.
    tokens: int
    rank: int = 0
    of: int = 1
    interleave: int = 1

    @classmethod
    def of_group(cls, geometry: RankGeometry, group: int) -> Axis:
        """That of a rank's cache group; a state is whole on each context-parallel rank."""
        share, tokens = geometry.share, geometry.groups[group].block_tokens
        return cls(tokens // share.of, share.rank, share.of, share.interleave) if tokens else cls(0)

    @property
    def block_tokens(self) -> int:
        """Positions that one block id stands for, over all ranks."""
        return self.tokens * self.of or 1

    def holds(self, positions: Numbers) -> NDArray[np.bool_]:
        """Which of these positions are on this rank."""
        held: NDArray[np.bool_] = positions // self.interleave % self.of == self.rank
        return held

    def slots(self, positions: Numbers) -> Numbers:
        """Where in their pages positions are that this rank holds."""
        within = positions % self.block_tokens
        return within // (self.interleave * self.of) * self.interleave + within % self.interleave


@attrs.frozen
class Box:
    """The overlap of two parts: rows of `width` bytes, by token and head, at strides of either side."""

    own_offset: int
    own_token: int
    own_head: int
    their_offset: int
    their_token: int
    their_head: int
    heads: int
    width: int

    @classmethod
    def of(cls, own: Part, theirs: Part, first: int, stop: int) -> Box:
        """That of heads `first` to `stop`, which both parts have."""
        heads, width = stop - first, own.width
        if heads == 1 or own.head_stride == theirs.head_stride == width:  # one row, however many heads
            heads, width = 1, heads * width
        return cls(
            own.offset + (first - own.first) * own.head_stride,
            own.token_stride,
            own.head_stride if heads > 1 else 0,
            theirs.offset + (first - theirs.first) * theirs.head_stride,
            theirs.token_stride,
            theirs.head_stride if heads > 1 else 0,
            heads,
            width,
        )

    def moved(self, own: int, theirs: int) -> Box:
        """The same one, so many bytes later on either side."""
        return attrs.evolve(self, own_offset=self.own_offset + own, their_offset=self.their_offset + theirs)


@attrs.frozen(eq=False)
class Meeting:
    """The positions of one period that are on both sides, in order; what follows repeats it, so many blocks later.

    A segment is what lies in one block of either side. Segments follow each other, and each begins and ends with a
    position that both sides have.
    """

    period: int
    #: Blocks of a period.
    own_blocks: int
    their_blocks: int
    positions: Numbers
    own_slots: Numbers
    their_slots: Numbers
    #: For each position its segment.
    segments: Numbers
    #: For each segment its first position, the one behind its last, and its blocks.
    begins: Numbers
    ends: Numbers
    own_block: Numbers
    their_block: Numbers


@attrs.frozen(eq=False)
class Runs:
    """Bytes that are contiguous on both sides, in the order of steps and of the reader's memory."""

    #: Which segment (or which of a meeting's positions) they belong to.
    step: Numbers
    own: Numbers
    theirs: Numbers
    nbytes: Numbers

    def __len__(self) -> int:
        return len(self.step)

    def select(self, chosen: NDArray[np.bool_]) -> Runs:
        """Some of them."""
        return Runs(self.step[chosen], self.own[chosen], self.theirs[chosen], self.nbytes[chosen])


@attrs.frozen(eq=False)
class Pattern:
    """What one page has of another over a period: by whole segments, and by single positions for cut ones."""

    meeting: Meeting
    whole: Runs
    single: Runs


@lru_cache(maxsize=512)
def meet(own: Axis, theirs: Axis) -> Meeting:
    """Where two sides have the same positions; none if they share none."""
    if not own.tokens:
        one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
        return Meeting(1, 1, 1, zero, zero, zero, zero, zero, one, zero, zero)
    period = math.lcm(own.block_tokens, theirs.block_tokens)
    if period > MAX_PERIOD:
        raise Incompatible(
            f"Blocks of {theirs.block_tokens} tokens were to be read into blocks of {own.block_tokens}.",
            f"They begin together only every {period:,} tokens; at most {MAX_PERIOD:,} are provided for.",
            "Choose block sizes with a common divisor.",
        )
    positions = np.arange(period, dtype=np.int64)
    positions = positions[own.holds(positions) & theirs.holds(positions)]
    own_block, their_block = positions // own.block_tokens, positions // theirs.block_tokens
    opens = np.ones(len(positions), bool)
    opens[1:] = (own_block[1:] != own_block[:-1]) | (their_block[1:] != their_block[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(positions))[: len(first)] - 1
    return Meeting(
        period,
        period // own.block_tokens,
        period // theirs.block_tokens,
        positions,
        own.slots(positions),
        theirs.slots(positions),
        np.cumsum(opens) - 1,
        positions[first],
        positions[last] + 1,
        own_block[first],
        their_block[first],
    )


def rows(own: Axis, theirs: Axis, boxes: Sequence[Box]) -> int:
    """How many rows of bytes a pattern is made of."""
    return len(meet(own, theirs).positions) * sum(box.heads for box in boxes)


def normal(boxes: Sequence[Box]) -> tuple[int, int, tuple[Box, ...]]:
    """The first offset on either side, and the same boxes from there: equal for layers of one shape."""
    own, theirs = min(box.own_offset for box in boxes), min(box.their_offset for box in boxes)
    return own, theirs, tuple(box.moved(-own, -theirs) for box in boxes)


@lru_cache(maxsize=128)
def pattern(own: Axis, theirs: Axis, boxes: tuple[Box, ...]) -> Pattern:
    """Runs of one page of either side, maximally joined."""
    meeting = meet(own, theirs)
    step, own_at, their_at, nbytes = [], [], [], []
    for box in boxes:
        heads = np.arange(box.heads, dtype=np.int64)
        own_at.append(_places(box.own_offset, meeting.own_slots, box.own_token, heads, box.own_head))
        their_at.append(_places(box.their_offset, meeting.their_slots, box.their_token, heads, box.their_head))
        step.append(np.repeat(np.arange(len(meeting.positions), dtype=np.int64), box.heads))
        nbytes.append(np.full(len(step[-1]), box.width, np.int64))
    single = joined(*map(np.concatenate, (step, own_at, their_at, nbytes)))
    return Pattern(meeting, joined(meeting.segments[single.step], single.own, single.theirs, single.nbytes), single)


def joined(step: Numbers, own: Numbers, theirs: Numbers, nbytes: Numbers) -> Runs:
    """Runs of one step that touch on both sides become one."""
    order = np.lexsort((own, step))
    step, own, theirs, nbytes = step[order], own[order], theirs[order], nbytes[order]
    opens = np.ones(len(step), bool)
    touch = (own[:-1] + nbytes[:-1] == own[1:]) & (theirs[:-1] + nbytes[:-1] == theirs[1:])
    opens[1:] = (step[1:] != step[:-1]) | ~touch
    first = np.flatnonzero(opens)
    return Runs(step[first], own[first], theirs[first], np.add.reduceat(nbytes, first) if len(first) else nbytes)


def _places(offset: int, slots: Numbers, token: int, heads: Numbers, head: int) -> Numbers:
    places: Numbers = (offset + slots[:, None] * token + heads[None, :] * head).ravel()
    return places
