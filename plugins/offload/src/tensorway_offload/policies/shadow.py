"""What other orders would have found: the same requests, keys alone, a sample of them. May import the offload room.

A sample of one key in `2**n` in a cache of that share of the room meets the same fate as all keys do; the sample is
chosen by the keys themselves, so that a block is always in it or never.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from tensorway.offload import OffloadKey
from tensorway_offload.policies.hazards import Pair, Table
from tensorway_offload.policies.runs import Runs

#: Room of a shadow, at least if there is that much: below, chance decides.
_ROOM: Final = 4096
#: Requests after which what was found counts for a third.
_MEMORY: Final = 1500.0
#: How often the room is filled while what is trusted has not proven itself.
_TRIAL: Final = 2


class Shadow:
    """A cache of keys alone, with an order of its own."""

    def __init__(self, capacity: int, order: Callable[[Runs], Iterator[OffloadKey]]) -> None:
        self._capacity, self._order = capacity, order
        self._runs = Runs(capacity)

    def request(self, keys: Sequence[OffloadKey], kinds: Sequence[tuple[Table | Pair | None, int]], now: int) -> int:
        """A request for these, in parts of these kinds and lengths, the tail first; how many it found."""
        places = self._runs.places
        found = next((at for at, key in enumerate(keys) if places.get(key) is None), len(keys))
        end = len(keys)
        for kind, count in kinds:
            self._runs.claim(keys[end - count : end], kind, now)
            end -= count
        if (much := places.count - self._capacity) > 0:
            own = frozenset(keys)
            gone = [
                key for key, _ in zip((k for k in self._order(self._runs) if k not in own), range(much), strict=False)
            ]
            gone += keys[len(keys) - (much - len(gone)) :] if much > len(gone) else []
            places.drop(gone)
        return found


class Guard:
    """Compares two orders while they run, and says whether the first is the better one here."""

    def __init__(
        self,
        capacity: int,
        orders: Sequence[Callable[[Runs], Iterator[OffloadKey]]],
        caution: float,
        trusted: bool = False,
    ) -> None:
        """`caution`: by how many times what chance explains the first must be better; by one less to stay so.

        What is `trusted` begins as the better one. It stays so until it is found to be worse by what chance explains,
        or until the room was filled twice and it is not clearly better; once it is, until it leads no more.
        """
        self._caution, self._trusted, self._proven = caution, trusted, False
        self._shift = max(0, (capacity // _ROOM).bit_length() - 1)
        self._shadows = [Shadow(capacity >> self._shift, order) for order in orders]
        #: What each would have found, of all keys.
        self.found = [0] * len(orders)
        self.better = trusted
        #: Blocks to be stored before what is trusted must be proven.
        self._unproven = _TRIAL * (capacity >> self._shift)
        self._lead, self._noise = 0.0, 0.0

    def request(self, keys: Sequence[OffloadKey], last: Table | Pair | None, table: Table | Pair, now: int) -> None:
        """A request for these; `last` is what its last block is, if not of the table of the others."""
        mask = (1 << self._shift) - 1
        sample = [key for key in keys if not zlib.crc32(key) & mask] if mask else keys
        if not sample:
            return
        alone = int(last is not table and sample[-1] == keys[-1])
        kinds = ((last, alone), (table, len(sample) - alone))
        found = [shadow.request(sample, kinds, now) for shadow in self._shadows]
        self.found = [total + (count << self._shift) for total, count in zip(self.found, found, strict=True)]
        lead, left = found[0] - found[1], 1 - 1 / _MEMORY
        self._lead, self._noise = self._lead * left + lead, self._noise * left + lead * lead
        self._judge(len(sample) - found[0])

    def _judge(self, stored: int) -> None:
        noise = math.sqrt(self._noise)
        if not self._trusted:
            self.better = self._lead > (self._caution - self.better) * noise
            return
        self._unproven -= stored
        self._proven = self._proven or self._lead > self._caution * noise
        enough = 0.0 if self._proven else -noise
        self._trusted = self.better = (self._proven or self._unproven > 0) and (self._lead > enough or not noise)
