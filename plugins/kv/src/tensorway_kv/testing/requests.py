"""Requests of a campaign: which blocks each has on both sides, what is in them, and what of it has arrived.

May import the core's `testing` and this dist. Blocks of a producer are counted, for requests with a common prefix share
them; who is given a block twice, or never back, is found out.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from tensorway.testing.ranks import Rank
from tensorway_kv.testing.engine import Engine, fill
from tensorway_kv.testing.memory import JUNK, PAGES, salted
from tensorway_kv.testing.shapes import Mixed

Lists = list[list[int]]


@attrs.define
class Wanted:
    """A request on its way from one engine to another."""

    number: int
    tokens: int
    have: int
    their_blocks: Lists
    our_blocks: Lists
    #: Tokens that are those of another request, and by which number their bytes are told; 0 for none.
    shared: int
    salt_of_shared: int
    #: With which block each list begins as it is told, for windows need the last ones only.
    their_first: list[int]
    our_first: list[int]
    ticket: Any = None
    since: float = 0.0
    #: Seconds until it ended; 0 while it has not.
    ended: float = 0.0
    #: Whether its ticket is worth nothing, and whether the fault of its round met it.
    miss: bool = False
    struck: bool = False
    #: Whether the consumer is to hear what became of it.
    told: bool = True
    #: Whether it was promised before it was computed, and up to which token it is.
    promised: bool = False
    computed: int = 0
    #: Tokens that the consumer was told are good.
    good: int = 0

    @property
    def theirs(self) -> str:
        """What the producer calls it."""
        return f"kept-{self.number}"

    @property
    def here(self) -> str:
        """What the consumer calls it."""
        return f"here-{self.number}"

    def their_lists(self) -> Lists:
        """The producer's blocks, as the engine tells them."""
        return [ids[first:] for ids, first in zip(self.their_blocks, self.their_first, strict=True)]

    def our_lists(self) -> Lists:
        """The consumer's."""
        return [ids[first:] for ids, first in zip(self.our_blocks, self.our_first, strict=True)]

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """From which to before which token, and by which number its bytes are told."""
        return [(0, self.shared, self.salt_of_shared), (self.shared, self.tokens, self.number)]


class Requests:
    """All requests of two engines."""

    def __init__(self, rng: random.Random, theirs: Mixed, ours: Mixed) -> None:
        self._rng, self._theirs, self._ours = rng, theirs, ours
        #: How many requests hold each block, by group.
        self._held: list[Counter[int]] = [Counter() for _ in theirs.groups]
        self._used: list[set[int]] = [set() for _ in ours.groups]
        self._kept: dict[str, Wanted] = {}
        self._number = 0

    @property
    def whole(self) -> bool:
        """Whether nobody holds a block."""
        return not any(self._used) and not any(+held for held in self._held)

    def several(self, count: int) -> list[Wanted]:
        """Requests that are handed over at once; some begin with the same tokens."""
        made: list[Wanted] = []
        for _ in range(count):
            made.append(self._one(made))
            self._kept[made[-1].theirs] = made[-1]
        return made

    def _one(self, others: list[Wanted]) -> Wanted:
        rng, self._number = self._rng, self._number + 1
        tokens = rng.randint(1, 28)
        period = math.lcm(*(each for each in self._theirs.page_tokens if each))
        shared, salt, twin = 0, 0, None
        if others and rng.random() < 0.5:
            twin = others[0]  # whose bytes are its own, from the first on
            shared, salt = min(tokens, twin.tokens) // period * period, twin.number
        their_blocks = []
        for group, each in enumerate(self._theirs.page_tokens):
            ids = twin.their_blocks[group][: shared // each] if twin is not None and each else []
            free = [block for block in range(PAGES) if not self._held[group][block]]
            ids = ids + rng.sample(free, (-(-tokens // each) if each else 1) - len(ids))
            self._held[group].update(ids)
            their_blocks.append(ids)
        our_blocks = []
        for used, each in zip(self._used, self._ours.page_tokens, strict=True):
            free = [block for block in range(PAGES) if block not in used]
            our_blocks.append(rng.sample(free, -(-tokens // each) if each else 1))
            used.update(our_blocks[-1])
        have = rng.choice((0, 0, 0, rng.randint(0, tokens)))
        first, our_first = self._first(self._theirs, tokens), self._first(self._ours, tokens)
        return Wanted(self._number, tokens, have, their_blocks, our_blocks, shared, salt, first, our_first)

    def _first(self, shape: Mixed, tokens: int) -> list[int]:
        short = self._rng.random() < 0.5
        return [
            max(0, tokens - group.window) // group.page_tokens if short and group.window else 0
            for group in shape.groups
        ]

    def compute(self, producer: Engine, one: Wanted) -> None:
        """Write the bytes of all its tokens; those that it shares are there."""
        producer.each(fill, one.their_blocks, one.tokens, one.number, one.shared)

    def let_go(self, request: str) -> Lists | None:
        """Nobody needs a request's blocks: those that no other holds, to be used for something else."""
        one = self._kept.pop(request)
        return self._give(one)

    def _give(self, one: Wanted) -> Lists:
        for held, ids in zip(self._held, one.their_blocks, strict=True):
            held.subtract(ids)
        return [
            [block for block in ids if not held[block]] for held, ids in zip(self._held, one.their_blocks, strict=True)
        ]

    def forget(self) -> None:
        """The producer began anew, and holds nothing."""
        for one in self._kept.values():
            self._give(one)
        self._kept.clear()

    def ended(self, wanted: list[Wanted]) -> None:
        """The consumer's blocks are free."""
        for one in wanted:
            for used, ids in zip(self._used, one.our_blocks, strict=True):
                used.difference_update(ids)


def check(rank: Rank, wanted: Sequence[Wanted]) -> int:
    """See that what was received is there and nothing else is; forget it all. How many bytes were compared."""
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    compared = 0
    for one in wanted:
        if one.good < one.tokens:  # whatever is in its own blocks, it was promised up to `good` only
            for page in held.pages(one.our_blocks):
                expected[page] = held.memory[page]
        for group, about in enumerate(held.geometry.groups):
            begin = max(one.have, one.good - about.window) if about.window else one.have
            if one.have == one.tokens or one.good <= one.have:
                continue
            for first, stop, salt in one.spans:
                positions = range(max(first, begin), min(stop, one.good))
                last = stop == one.tokens and one.good == one.tokens
                for plane, places, names in held.places(one.our_blocks, positions, last):
                    if plane.group == group:
                        expected[places] = salted(names, salt)
                        compared += places.size
    np.testing.assert_array_equal(held.memory, expected)
    held.memory[:] = JUNK
    return compared
