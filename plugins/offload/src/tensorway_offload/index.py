"""Which block is in which row of the primary memory, and who holds it. May import the core's offload room.

A million blocks in one dict would be moved to a new one in a single call, every now and then, for tens of milliseconds;
so there are many small dicts. What is known of a row is a byte and a number, which no garbage collector looks at.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from tensorway.offload import OffloadKey

#: States of a row. `RESERVED`: a block is being written to it. `READY`: it can be read; it may be evicted if nobody
#: holds it. `GONE`: its block is forgotten, and somebody still holds it: it is free when he lets go.
FREE: Final = 0
RESERVED: Final = 1
READY: Final = 2
GONE: Final = 3
#: Blocks of one dict: below a third of a power of two, up to which CPython keeps a dict of changing keys small.
_OF_ONE: Final = 2500


class Index:
    """Rows by key, with the number of holds on each. Keys in one list differ from each other."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        #: Rows that can be evicted; rows that are being written; rows whose block is forgotten and that are held.
        self.idle = self.reserved = self.gone = 0
        #: Blocks that are here, also those that are being written.
        self.present = 0
        self._count = max(1, -(-capacity // _OF_ONE))
        self._homes: list[dict[OffloadKey, int]] = [{} for _ in range(self._count)]
        self._states = bytearray(capacity)
        self._holds = array("i", bytes(4 * capacity))
        self._spare: list[int] = []
        #: Rows from here on were never used.
        self._fresh = 0

    @property
    def free(self) -> int:
        """Rows that can be taken at once."""
        return len(self._spare) + self.capacity - self._fresh

    def find(self, keys: Iterable[OffloadKey]) -> list[int | None]:
        """The row of each block, ready or being written."""
        homes, count = self._homes, self._count
        return [homes[hash(key) % count].get(key) for key in keys]

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

    def evictable(self, rows: Iterable[int | None]) -> list[bool]:
        """Which of these rows hold a block that nobody uses."""
        holds = self._holds
        return [row is not None and not holds[row] for row in rows]

    def all_evictable(self, rows: Sequence[int | None]) -> bool:
        """Whether all of these are; cheaper than to ask for which."""
        return None not in rows and not any(map(self._holds.__getitem__, rows))  # type: ignore[arg-type]

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
        homes, count, states, holds = self._homes, self._count, self._states, self._holds
        for key, row in zip(keys, rows, strict=True):
            homes[hash(key) % count][key] = row
            states[row] = RESERVED
            holds[row] = 1
        self.reserved += len(rows)
        self.present += len(rows)
        return rows

    def publish(self, rows: Sequence[int]) -> None:
        """What was written to these reserved rows can be read now; who wrote it still holds them."""
        states = self._states
        for row in rows:
            states[row] = READY
        self.reserved -= len(rows)

    def evict(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """Free these rows, which are evictable."""
        homes, count, states = self._homes, self._count, self._states
        for key, row in zip(keys, rows, strict=True):
            del homes[hash(key) % count][key]
            states[row] = FREE
        self._spare += rows
        self.idle -= len(rows)
        self.present -= len(rows)

    def forget(self, keys: Iterable[OffloadKey]) -> None:
        """These are not here any more; their rows are free as soon as nobody holds them. Unknown ones do not matter."""
        for key in keys:
            row = self._homes[hash(key) % self._count].pop(key, None)
            if row is not None:
                self.present -= 1
                self._leave(row)

    def clear(self) -> None:
        """Nothing is here any more."""
        for home in self._homes:
            for row in home.values():
                self._leave(row)
            home.clear()
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
