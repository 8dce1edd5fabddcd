"""Blocks whose key says what they hold, a ledger that outlives who writes it, and the judge of what is read.

May import the core and this dist. A ledger is shared memory: a child that is killed has said in it what it was told.
"""

from __future__ import annotations

import hashlib
import mmap
import random
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import attrs

from tensorway.offload import OffloadKey, Outcome, Tier, TierContext, make_offload_key

#: Lengths of blocks: pages, odd ones, small ones, more than one page, and one that goes past the page cache.
SIZES: Final = (4096, 131072, 8192, 12288, 5000, 700, 64, 1)
CONTEXT: Final = TierContext("campaign", b"one fingerprint", (4096,), facts={"model": "campaign"}, deadline=60.0)
DEADLINE: Final = 60.0

#: What is known of a block: nobody has it, it is being stored, it is stored, being deleted, or one of both is unknown.
NEVER, STORING, STORED, DELETING = range(4)


def key_of(number: int) -> OffloadKey:
    """A block's key; every third is another tenant's."""
    return make_offload_key(hashlib.sha256(b"%d" % number).digest(), 0, "" if number % 3 else "other")


def size_of(number: int) -> int:
    """A block's length."""
    return SIZES[number % len(SIZES)]


@lru_cache(maxsize=256)
def block_of(number: int) -> bytes:
    """What a block holds, for ever."""
    return random.Random(number).randbytes(size_of(number))


def aligned(data: bytes) -> memoryview:
    """The same where a disk can read it without a copy."""
    memory = memoryview(mmap.mmap(-1, max(1, len(data))))[: len(data)]
    memory[:] = data
    return memory


class Wrong(AssertionError):
    """What must never happen."""


class Ledger:
    """What each block's writer was told; processes share it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._states = mmap.mmap(-1, count + 1)

    def __getitem__(self, number: int) -> int:
        return self._states[number]

    def set(self, numbers: Iterable[int], state: int) -> None:
        """Write it down, before it is done or after."""
        for number in numbers:
            self._states[number] = state

    def blame(self) -> None:
        """A child has read what it should not have."""
        self._states[self.count] = 1

    @property
    def blamed(self) -> bool:
        """Whether one has."""
        return bool(self._states[self.count])

    def clear(self) -> None:
        """For another folder."""
        self._states[:] = bytes(len(self._states))


def read(tier: Tier, numbers: Iterable[int]) -> dict[int, Outcome]:
    """Read these; raises `Wrong` for a byte that was not stored."""
    wanted = list(numbers)
    items = [(key_of(number), memoryview(bytearray(size_of(number)))) for number in wanted]
    outcomes = tier.get(items, DEADLINE)
    for number, outcome, (_, data) in zip(wanted, outcomes, items, strict=True):
        if outcome == "done" and data != block_of(number):
            raise Wrong(f"block {number} was read with other bytes than were stored")
    return dict(zip(wanted, outcomes, strict=True))


@attrs.frozen
class Judge:
    """What may be read after something has happened."""

    #: Whether what was said to be stored must be there.
    keeps: bool
    #: Whether what was said to be deleted must not be there.
    deletes: bool
    #: Whether something may be found damaged.
    damages: bool

    def check(self, tier: Tier, ledger: Ledger) -> Counter[str]:
        """How many blocks were what; raises `Wrong`. The ledger then says what is there."""
        if ledger.blamed:
            raise Wrong("a child has read other bytes than were stored")
        found: Counter[str] = Counter()
        for number, outcome in read(tier, range(ledger.count)).items():
            state = ledger[number]
            if outcome not in {"done", "missing", "corrupt"} or (outcome == "corrupt" and not self.damages):
                raise Wrong(f"block {number} was {outcome}")
            if state == STORED and self.keeps and outcome != "done":
                raise Wrong(f"block {number} was stored, and is {outcome}")
            if state == NEVER and self.deletes and outcome == "done":
                raise Wrong(f"block {number} was deleted, or never stored, and is there")
            found[outcome] += 1
            ledger.set([number], STORED if outcome == "done" else NEVER)
        return found
