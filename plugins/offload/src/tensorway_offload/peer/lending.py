"""What a peer is answered: which rows it may read, for how long, and what it must find there.

May import the core's offload room, xxhash and this package's messages. Rows are lent by the primary tier, which holds
them for the time of the lease and not a moment longer, whatever the borrower does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import attrs
import xxhash

from tensorway.offload import Lender, OffloadKey, key_group
from tensorway_offload.peer.messages import VERSION, Answer, Ask

#: Seconds before its end in which a lease is not given back: it may have ended by the primary tier's clock.
_EDGE: Final = 0.05
_NO_SUM: Final = b""


def checksum(view: memoryview) -> bytes:
    """Of the bytes of a block."""
    return xxhash.xxh3_64_digest(view)


@attrs.frozen
class _Lease:
    keys: Sequence[OffloadKey]
    until: float


class Lending:
    """Rows that are lent. One thread uses it."""

    def __init__(
        self, lender: Lender, memory: memoryview, row_bytes: int, nbytes: Sequence[int], longest: float, most: int
    ) -> None:
        self._lender, self._memory, self._row_bytes, self._nbytes = lender, memory, row_bytes, nbytes
        self._longest, self._most = longest, most
        #: By borrower and number.
        self._leases: dict[tuple[str, int], _Lease] = {}

    @property
    def lent(self) -> int:
        """Rows that are lent now."""
        return sum(len(lease.keys) for lease in list(self._leases.values()))

    def answer(self, borrower: str, ask: Ask) -> Answer:
        """What is there of what a peer asks for, and for how long."""
        keys = [OffloadKey(key) for key in ask.keys]
        seconds = min(ask.seconds, self._longest)
        if len(set(keys)) != len(keys) or any(key_group(key) >= len(self._nbytes) for key in keys):
            keys, seconds = [], 0.0
        elif seconds and not self._may_borrow(borrower, ask.number, len(keys)):
            return Answer(VERSION, ask.number, (-1,) * len(keys), (_NO_SUM,) * len(keys), 0.0)
        # Who only wants to know is lent rows for the moment in which that is found out.
        until = time.monotonic() + (seconds or self._longest)
        rows = self._lender.lend(keys, seconds or self._longest)
        lent = [key for key, row in zip(keys, rows, strict=True) if row is not None]
        if not seconds:
            self._lender.returned(lent)
            sums = [_NO_SUM] * len(keys)
        else:
            if lent:
                self._leases[borrower, ask.number] = _Lease(lent, until)
            sums = [self._sum(key, row) for key, row in zip(keys, rows, strict=True)]
        told = tuple(-1 if row is None else row for row in rows)
        return Answer(VERSION, ask.number, told, tuple(sums), seconds)

    def returned(self, borrower: str, number: int) -> None:
        """A peer has read what it wanted."""
        lease = self._leases.pop((borrower, number), None)
        if lease is not None and time.monotonic() < lease.until - _EDGE:
            self._lender.returned(lease.keys)

    def tidy(self) -> None:
        """Forget leases that are over: the primary tier has its rows back."""
        now = time.monotonic()
        for key in [key for key, lease in self._leases.items() if now >= lease.until]:
            del self._leases[key]

    def close(self) -> None:
        """Nobody can read any more."""
        for borrower, number in list(self._leases):
            self.returned(borrower, number)

    def _may_borrow(self, borrower: str, number: int, count: int) -> bool:
        self.tidy()
        held = sum(len(lease.keys) for (who, _), lease in self._leases.items() if who == borrower)
        return held + count <= self._most and (borrower, number) not in self._leases

    def _sum(self, key: OffloadKey, row: int | None) -> bytes:
        if row is None:
            return _NO_SUM
        start = row * self._row_bytes
        return checksum(self._memory[start : start + self._nbytes[key_group(key)]])
