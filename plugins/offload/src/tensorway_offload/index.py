"""Which block is in which row of the primary memory, and who holds it. May import the core's offload room.

Calls are of many blocks, and what can be done for all of them at once is left to C.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tensorway.offload import OffloadKey
from tensorway_offload.homes import FEW, Homes, ManyHomes, OneHome

#: States of a row. `RESERVED`: a block is being written to it. `READY`: it can be read; it may be evicted if nobody
#: holds it. `GONE`: its block is forgotten, and somebody still holds it: it is free when he lets go.
FREE: Final = 0
RESERVED: Final = 1
READY: Final = 2
GONE: Final = 3


class Index:
    """Rows by key, with the number of holds on each. Keys in one list differ from each other."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        #: Rows that can be evicted; rows that are being written; rows whose block is forgotten and that are held.
        self.idle = self.reserved = self.gone = 0
        #: Blocks that are here, also those that are being written.
        self.present = 0
        self._homes: Homes = OneHome() if capacity <= FEW else ManyHomes(capacity)
        self._states = bytearray(capacity)
        self._holds = [0] * capacity
        self._keys: list[OffloadKey] = [OffloadKey(b"")] * capacity
        self._spare: list[int] = []
        #: Rows from here on were never used.
        self._fresh = 0

    @property
    def free(self) -> int:
        """Rows that can be taken at once."""
        return len(self._spare) + self.capacity - self._fresh

    def find(self, keys: Sequence[OffloadKey]) -> list[int | None]:
        """The row of each block, ready or being written."""
        return self._homes.get(keys)

    def keys_of(self, rows: Iterable[int]) -> list[OffloadKey]:
        """What is in these rows, which are ready or reserved."""
        return list(map(self._keys.__getitem__, rows))

    def leading(self, rows: Sequence[int | None]) -> int:
        """How many of these rows are ready, from the first on."""
        try:
            end = rows.index(None)
        except ValueError:
            end = len(rows)
        if self.reserved:
            state = bytes(map(self._states.__getitem__, rows[:end]))  # type: ignore[arg-type]  # None is behind
            end = state.find(RESERVED) if RESERVED in state else end
        return end

    def is_ready(self, row: int) -> bool:
        """Whether the block in a row that was found can be read."""
        return self._states[row] == READY

    def held(self, rows: Iterable[int]) -> list[int]:
        """How often each of these is held; a block whose row nobody holds can be evicted."""
        return list(map(self._holds.__getitem__, rows))

    def hold(self, rows: Iterable[int]) -> None:
        """One hold more on each of these rows, which are ready."""
        holds, idle = self._holds, 0
        for row in rows:
            count = holds[row]
            holds[row] = count + 1
            if not count:
                idle += 1
        self.idle -= idle

    def release(self, rows: Iterable[int]) -> None:
        """One hold less on each of these; rows whose block is forgotten become free."""
        holds, states, idle = self._holds, self._states, 0
        for row in rows:
            left = holds[row] - 1
            holds[row] = left
            if not left:
                if states[row] == GONE:
                    self._drop(row)
                else:
                    idle += 1
        self.idle += idle

    def reserve(self, keys: Sequence[OffloadKey]) -> list[int]:
        """Rows for these, which are not here; who writes them holds each once. There must be so many free ones."""
        rows = self._take(len(keys))
        self._homes.put(keys, rows)
        states, holds, known = self._states, self._holds, self._keys
        for key, row in zip(keys, rows, strict=True):
            states[row] = RESERVED
            holds[row] = 1
            known[row] = key
        self.reserved += len(rows)
        self.present += len(rows)
        return rows

    def publish(self, rows: Sequence[int]) -> None:
        """What was written to these reserved rows can be read now; who wrote it still holds them."""
        states = self._states
        for row in rows:
            states[row] = READY
        self.reserved -= len(rows)

    def evict(self, rows: Sequence[int]) -> list[OffloadKey]:
        """Free these rows, which are evictable; what was in them."""
        keys, states = self.keys_of(rows), self._states
        self._homes.pop(keys)
        for row in rows:
            states[row] = FREE
        self._spare += rows
        self.idle -= len(rows)
        self.present -= len(rows)
        return keys

    def forget(self, keys: Sequence[OffloadKey]) -> None:
        """These, which are here, are not here any more; their rows are free as soon as nobody holds them."""
        for row in self._homes.pop(keys):
            self.present -= 1
            self._leave(row)

    def clear(self) -> None:
        """Nothing is here any more."""
        for row in self._homes.clear():
            self._leave(row)
        self.present = 0

    def _leave(self, row: int) -> None:
        was, self._states[row] = self._states[row], GONE
        self.gone += 1
        self.reserved -= was == RESERVED
        if not self._holds[row]:
            self.idle -= 1
            self._drop(row)

    def _drop(self, row: int) -> None:
        self._states[row] = FREE
        self.gone -= 1
        self._spare.append(row)

    def _take(self, count: int) -> list[int]:
        cut = max(0, len(self._spare) - count)
        rows = self._spare[cut:]
        del self._spare[cut:]
        more = count - len(rows)
        rows += range(self._fresh, self._fresh + more)
        self._fresh += more
        return rows
