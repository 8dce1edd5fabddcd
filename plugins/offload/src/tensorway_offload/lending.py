"""Rows that other engines read, each for a limited time. May import the core's offload room and the index."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from tensorway.offload import OffloadKey
from tensorway_offload.index import Index

#: Loans that have ended and may be remembered, beside as many as are open.
_ENDED: Final = 1024


class Lending:
    """Who forgets to return a row has it until its time is over."""

    def __init__(self, index: Index, most: int, seconds: float) -> None:
        self._index, self._most, self._seconds = index, most, seconds
        self._number = 0
        #: Loans by key: their numbers, the oldest first, and the row that each is of.
        self._loans: dict[OffloadKey, dict[int, int]] = {}
        self._ends: list[tuple[float, int, OffloadKey]] = []
        self.count = 0

    def lend(self, keys: Sequence[OffloadKey], seconds: float, now: float) -> list[int | None]:
        """Hold these for so long; the row of each, None for one that is not here or if too many are lent."""
        until = now + min(seconds if seconds > 0 else 0.0, self._seconds)  # a peer may ask for NaN
        found: list[int | None] = []
        for key, row in zip(keys, self._index.find(keys), strict=True):
            if row is None or not self._index.is_ready(row) or self.count >= self._most:
                found.append(None)
                continue
            self._number += 1
            self.count += 1
            self._loans.setdefault(key, {})[self._number] = row
            heapq.heappush(self._ends, (until, self._number, key))
            self._index.hold([row])
            found.append(row)
        return found

    def returned(self, keys: Sequence[OffloadKey]) -> None:
        """Let go of the oldest loan of each of these; of those that are not lent nothing happens."""
        for key in keys:
            if key in self._loans:
                self._end(key, next(iter(self._loans[key])))
        if len(self._ends) > 2 * self.count + _ENDED:
            self._ends = [end for end in self._ends if self._is_open(end)]
            heapq.heapify(self._ends)

    def expired(self, now: float) -> None:
        """Let go of those whose time is over."""
        while self._ends and self._ends[0][0] <= now:
            _, number, key = heapq.heappop(self._ends)
            if number in self._loans.get(key, ()):
                self._end(key, number)

    def _is_open(self, end: tuple[float, int, OffloadKey]) -> bool:
        return end[1] in self._loans.get(end[2], ())

    def _end(self, key: OffloadKey, number: int) -> None:
        loans = self._loans[key]
        self._index.release([loans.pop(number)])
        self.count -= 1
        if not loans:
            del self._loans[key]
