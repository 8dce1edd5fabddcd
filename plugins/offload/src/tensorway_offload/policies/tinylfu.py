"""The policy `tinylfu`: W-TinyLFU as an order. May import the offload room and `recency`.

As in Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy" (2017): what is new is in a
window; what leaves it is compared with what would have to go for it, and the one that was asked for less often goes. A
sketch counts how often, four bits for each, and halves all counts every so often. Nothing is refused here: what loses
is what goes first.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final

from tensorway.offload import OffloadKey, PolicyContext, ReqContext
from tensorway_offload.policies.options import TinyLfuOptions
from tensorway_offload.policies.recency import Recency

_MOST: Final = 15
#: Counts are halved after so many times the capacity.
_AGE: Final = 10
#: Counts of one row, for each block that there is room for.
_WIDTH: Final = 4
_HALVED: Final = bytes(value >> 1 for value in range(256))
#: Counts that one call halves.
_STEP: Final = 1 << 15


class Sketch:
    """How often keys were asked for, roughly: never less than that until counts are halved, and 15 at most."""

    def __init__(self, capacity: int) -> None:
        size = 1 << max(6, (_WIDTH * capacity - 1).bit_length())
        self._mask = size - 1
        self._rows = (bytearray(size), bytearray(size), bytearray(size), bytearray(size))
        self._left = self._every = _AGE * max(16, capacity)
        #: From where on counts are still to be halved.
        self._halving = len(self._rows) * size

    def add(self, keys: Sequence[OffloadKey]) -> None:
        """Each of these was asked for."""
        mask, (a, b, c, d) = self._mask, self._rows
        for key in keys:
            mixed = _mixed(key)
            at_a, at_b, at_c, at_d = mixed & mask, mixed >> 11 & mask, mixed >> 22 & mask, mixed >> 33 & mask
            least = min(a[at_a], b[at_b], c[at_c], d[at_d])
            if least == _MOST:
                continue
            # Only the least of them can be right, and the others are too high already.
            for row, at in ((a, at_a), (b, at_b), (c, at_c), (d, at_d)):
                if row[at] == least:
                    row[at] += 1
        self._left -= len(keys)
        if self._left <= 0:
            self._left, self._halving = self._every, 0
        self._halve()

    def count(self, key: OffloadKey) -> int:
        """How often it was asked for."""
        mixed, mask, (a, b, c, d) = _mixed(key), self._mask, self._rows
        return min(a[mixed & mask], b[mixed >> 11 & mask], c[mixed >> 22 & mask], d[mixed >> 33 & mask])

    def _halve(self) -> None:
        """A part in each call, so that no call takes long."""
        size = len(self._rows[0])
        if self._halving < len(self._rows) * size:
            row, at = self._rows[self._halving // size], self._halving % size
            end = min(size, at + _STEP)
            row[at:end] = row[at:end].translate(_HALVED)
            self._halving += end - at


def _mixed(key: OffloadKey) -> int:
    """The same in every process, unlike `hash`, so that a replay can be repeated."""
    mixed = zlib.crc32(key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF


class TinyLfu:
    """A window, and behind it two segments: on probation, and protected."""

    def __init__(self, options: TinyLfuOptions, context: PolicyContext) -> None:
        self._capacity = max(1, context.capacity)
        self._window_target = max(1, int(self._capacity * options.window))
        self._protected_target = (self._capacity - self._window_target) * 4 // 5
        self.reset()

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._window, self._probation = Recency(self._capacity), Recency(self._capacity)
        self._protected = Recency(self._capacity)
        self._sketch = Sketch(self._capacity)
        self._incoming = 0

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._sketch.add(keys)
        self._window.refresh(keys)
        self._protected.add([*self._protected.there(keys), *self._probation.discard(keys)])
        if (much := len(self._protected) - self._protected_target) > 0:
            self._probation.add(self._protected.discard(self._protected.oldest(much))[::-1])

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """These were asked for, and will push others out of the window."""
        self._sketch.add(keys)
        self._incoming = len(keys)

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._incoming = 0
        known = {*self._probation.there(keys), *self._protected.there(keys)}
        self._window.add([key for key in keys if key not in known])
        room = self._capacity - len(self._window) - len(self._probation) - len(self._protected)
        if room > 0 and (much := len(self._window) - self._window_target) > 0:  # nobody has to go for these
            self._pass(self._window.oldest(much))

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """The order of tokens, in each segment."""
        for segment in (self._window, self._probation, self._protected):
            segment.refresh(keys)

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        for segment in (self._window, self._probation, self._protected):
            segment.discard(keys)

    def victims(self) -> Iterator[OffloadKey]:
        """While the window is too long for what comes: the loser of each comparison; then all others."""
        leaving, main = iter(self._window), chain(self._probation, self._protected)
        over = len(self._window) + self._incoming - self._window_target
        won: list[OffloadKey] = []
        defender = next(main, None)
        while over > 0 and defender is not None and (candidate := next(leaving, None)) is not None:
            over -= 1
            if self._sketch.count(candidate) > self._sketch.count(defender):
                won.append(candidate)
                yield defender
                defender = next(main, None)
            else:
                yield candidate
        if defender is not None:
            yield defender
        yield from main
        yield from leaving
        yield from won

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`; who won against them goes where they were."""
        self._window.discard(keys)
        beaten = [*self._probation.there(keys), *self._protected.there(keys)]
        self.removed(beaten)
        winners = []
        for winner, loser in zip(self._window, beaten, strict=False):
            if self._sketch.count(winner) <= self._sketch.count(loser):
                break
            winners.append(winner)
        self._pass(winners)

    def _pass(self, keys: Sequence[OffloadKey]) -> None:
        """From the window to probation; the first of these is the least recent."""
        self._probation.add(self._window.discard(keys)[::-1])
