"""Rows for new blocks: free ones, and those of victims that the policy proposes. All that are asked for, or none.

May import the core's offload room, the index and the shares. A policy only orders: whether a victim can go is decided
here, so that a wrong policy costs hits and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, islice
from typing import Final

from tensorway.offload import OffloadKey, ReqContext, key_tenant
from tensorway_offload.index import Index
from tensorway_offload.orders import Order
from tensorway_offload.shares import Shares

#: Blocks of a tenant over its share that are remembered as its next victims, so that not every call looks for them
#: among all that others have.
_NEXT: Final = 4096

_NONE: Final[frozenset[int]] = frozenset()


class Room:
    """What can be evicted, and who decides."""

    def __init__(self, index: Index, order: Order, shares: Shares) -> None:
        self._index, self._order, self._shares = index, order, shares
        #: By tenant; of one that has none nothing is kept, for tenants come and go.
        self._next: dict[bytes, dict[OffloadKey, None]] = {}

    def used(self, keys: Sequence[OffloadKey]) -> None:
        """These are in use, and not the next ones to go."""
        for key in keys if self._next else ():
            known = self._next.get(name := key_tenant(key))
            if known is not None:
                known.pop(key, None)
                if not known:
                    del self._next[name]

    def can_have(self, count: int, kept: AbstractSet[int] = _NONE) -> bool:
        """Whether there are so many rows beside those that are kept, without asking the policy for them."""
        index = self._index
        short = count - index.free - index.idle
        return short <= 0 and (not kept or short + index.held(kept).count(0) <= 0)

    def make(
        self, keys: Sequence[OffloadKey], req: ReqContext, kept: AbstractSet[int] = _NONE
    ) -> list[OffloadKey] | None:
        """Evict until these have rows, and tell what had to go; None if it cannot be, and then all stays.

        The rows `kept` are never evicted for it.
        """
        if not self.can_have(len(keys), kept):
            return None
        self._order.wanted(keys, req)
        own = self._shares.over(keys)
        count = max(len(keys) - self._index.free, sum(own.values()))
        if count <= 0:
            return []
        rows = self._of_tenants(own, count, kept, req) if own else self._of_all(count, kept, req)
        if rows is None:
            return None
        gone = self._index.evict(rows)
        self._order.evicted(gone, rows)
        self._shares.removed(gone)
        if self._next:
            self.used(gone)
        return gone

    def reset(self) -> None:
        """Nothing is here."""
        self._next.clear()

    def _of_all(self, count: int, kept: AbstractSet[int], req: ReqContext) -> list[int] | None:
        """The first victims that can go, whosesoever they are."""
        chosen: dict[int, None] = {}
        busy: list[int] = []
        for rows in self._order.victims():
            chosen.update(dict.fromkeys(self._free_to_go(rows, kept, busy)))
            if len(chosen) >= count:
                break
        self._were_busy(busy, req)
        return list(islice(chosen, count)) if len(chosen) >= count else None

    def _of_tenants(
        self, own: Mapping[bytes, int], count: int, kept: AbstractSet[int], req: ReqContext
    ) -> list[int] | None:
        """As many of each tenant over its share as it must give, and beyond them whatever goes first."""
        left, others = dict(own), count - sum(own.values())
        chosen = self._remembered(left, kept)
        if others <= 0 and not any(left.values()):
            return list(chosen)
        busy: list[int] = []
        order = self._order.victims()
        while others > 0 or any(left.values()):
            rows = next(order, None)
            if rows is None:
                break
            for row, key in self._keyed(self._free_to_go(rows, kept, busy)):
                name = key_tenant(key)
                if row in chosen:
                    continue
                if left.get(name):
                    left[name] -= 1
                    chosen[row] = None
                elif others > 0:
                    others -= 1
                    chosen[row] = None
                elif name in own:
                    self._remember(name, key)
        else:
            self._look_ahead(order, own)
        del order
        self._were_busy(busy, req)
        return list(chosen) if others <= 0 and not any(left.values()) else None

    def _remembered(self, left: dict[bytes, int], kept: AbstractSet[int]) -> dict[int, None]:
        """Rows of tenants that were found to be the next ones to go; there are so many fewer to look for."""
        chosen: dict[int, None] = {}
        for name, count in left.items():
            known, wanted = self._next.get(name, {}), count
            while wanted and known:
                some = list(islice(known, wanted))
                for key in some:
                    del known[key]
                rows = [row for row in self._index.find(some) if row is not None]
                taken = self._free_to_go(rows, kept, [])
                chosen.update(dict.fromkeys(taken))
                wanted -= len(taken)
            left[name] = wanted
            if not known:
                self._next.pop(name, None)
        return chosen

    def _look_ahead(self, order: Iterator[list[int]], own: Mapping[bytes, int]) -> None:
        """Remember which blocks of these tenants come next."""
        for _, key in islice(self._keyed(chain.from_iterable(order)), _NEXT):
            if (name := key_tenant(key)) in own:
                self._remember(name, key)

    def _remember(self, name: bytes, key: OffloadKey) -> None:
        known = self._next.setdefault(name, {})
        if len(known) < _NEXT:
            known[key] = None

    def _keyed(self, rows: Iterable[int]) -> Iterator[tuple[int, OffloadKey]]:
        return ((row, self._index.keys_of((row,))[0]) for row in rows)

    def _free_to_go(self, rows: list[int], kept: AbstractSet[int], busy: list[int]) -> list[int]:
        """Those of these that can go; the others are added to `busy`."""
        held = self._index.held(rows)
        if not any(held) and kept.isdisjoint(rows):
            return rows
        pairs = list(zip(rows, held, strict=True))
        busy += [row for row, count in pairs if count or row in kept]
        return [row for row, count in pairs if not count and row not in kept]

    def _were_busy(self, busy: list[int], req: ReqContext) -> None:
        if busy:
            rows = list(dict.fromkeys(busy))
            self._order.used(self._index.keys_of(rows), rows, req)
