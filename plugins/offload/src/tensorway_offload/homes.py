"""Rows by key, many at once, in as few steps of the interpreter as there are. May import the core's offload room.

A dict whose keys come and go is moved to a new one every now and then, in one call: 4 ms for a hundred thousand, 50 for
a million. So few blocks are in one dict, and many are in many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Final, Protocol

from tensorway.offload import OffloadKey

#: Blocks that are few, and how many are in each of many dicts.
FEW: Final = 1 << 17
_OF_ONE: Final = 1 << 16
#: Which of many dicts a key is in: that of the last byte of its hash, which is before its tenant and its group.
_number_of: Final = itemgetter(-13)
#: Does all that an iterator does, and keeps nothing of it.
_all: Final = deque[object](maxlen=0).extend


class Homes(Protocol):
    """Rows by key. Keys in one list differ from each other, but for `get`."""

    def get(self, keys: Sequence[OffloadKey]) -> list[int | None]:
        """The row of each."""

    def put(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """These have these rows."""

    def pop(self, keys: Sequence[OffloadKey]) -> list[int]:
        """These, which have rows, have none any more; which ones they had."""

    def clear(self) -> list[int]:
        """No key has a row any more; which ones there were."""


class OneHome:
    """One dict."""

    def __init__(self) -> None:
        self._rows: dict[OffloadKey, int] = {}

    def get(self, keys: Sequence[OffloadKey]) -> list[int | None]:
        """See `Homes`."""
        return list(map(self._rows.get, keys))

    def put(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """See `Homes`."""
        self._rows.update(zip(keys, rows, strict=True))

    def pop(self, keys: Sequence[OffloadKey]) -> list[int]:
        """See `Homes`."""
        return list(map(self._rows.pop, keys))

    def clear(self) -> list[int]:
        """See `Homes`."""
        rows = list(self._rows.values())
        self._rows.clear()
        return rows


class ManyHomes:
    """A power of two of dicts, 256 at the most; the fewer they are, the more of them are in the processor's cache."""

    def __init__(self, capacity: int) -> None:
        count = min(256, 1 << (max(capacity, 1) // _OF_ONE).bit_length())
        self._homes: list[dict[OffloadKey, int]] = [{} for _ in range(count)]
        #: The dict of each byte.
        self._home = [self._homes[byte % count] for byte in range(256)].__getitem__

    def get(self, keys: Sequence[OffloadKey]) -> list[int | None]:
        """See `Homes`."""
        return list(map(dict.get, self._of(keys), keys))

    def put(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """See `Homes`."""
        _all(map(dict.__setitem__, self._of(keys), keys, rows))

    def pop(self, keys: Sequence[OffloadKey]) -> list[int]:
        """See `Homes`."""
        return list(map(dict.pop, self._of(keys), keys))

    def clear(self) -> list[int]:
        """See `Homes`."""
        rows = list(chain.from_iterable(home.values() for home in self._homes))
        for home in self._homes:
            home.clear()
        return rows

    def _of(self, keys: Sequence[OffloadKey]) -> Iterator[dict[OffloadKey, int]]:
        return map(self._home, map(_number_of, keys))
