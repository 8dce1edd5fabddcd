"""Rows for new blocks: free ones, and those of victims that the policy proposes. All that are asked for, or none.

May import the core's offload room, the index and the quotas. A policy only orders: whether a victim can go is decided
here, so that a wrong policy costs hits and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Final

from tensorway.offload import EvictionPolicy, OffloadKey, ReqContext
from tensorway_offload.index import Index
from tensorway_offload.quotas import Quotas, tenant

#: Victims that are looked at in one go, at the least.
_BATCH: Final = 64
#: Blocks of a tenant over its quota that are remembered as its next victims, so that not every call looks for them
#: among all that others have.
_NEXT: Final = 4096

_NONE: Final[frozenset[OffloadKey]] = frozenset()


class Room:
    """What can be evicted, and who decides."""

    def __init__(self, index: Index, policy: EvictionPolicy, quotas: Quotas) -> None:
        self._index, self._policy, self._quotas = index, policy, quotas
        self._next: dict[bytes, dict[OffloadKey, None]] = {}

    def used(self, keys: Sequence[OffloadKey]) -> None:
        """These are in use, and not the next ones to go."""
        for known in self._next.values():
            for key in keys:
                known.pop(key, None)

    def can_have(self, count: int, kept: AbstractSet[OffloadKey] = _NONE) -> bool:
        """Whether there are so many rows, without asking the policy for them."""
        index = self._index
        short = count - index.free - index.idle
        return short <= 0 and (not kept or short + sum(index.evictable(index.find(kept))) <= 0)

    def make(
        self, keys: Sequence[OffloadKey], req: ReqContext, kept: AbstractSet[OffloadKey] = _NONE
    ) -> list[OffloadKey] | None:
        """Evict until these have rows, and tell who had to go; None if it cannot be, and then all stays.

        `kept` are never evicted for it.
        """
        if not self.can_have(len(keys), kept):
            return None
        self._policy.wanted(keys, req)
        own = self._quotas.over(keys)
        count = max(len(keys) - self._index.free, sum(own.values()))
        if count <= 0:
            return []
        victims = self._of_tenants(own, count, kept, req) if own else self._of_all(count, kept, req)
        if victims is None:
            return None
        gone = list(victims)
        self._index.evict(gone, list(victims.values()))
        self._policy.evicted(gone)
        self._quotas.removed(gone)
        if self._next:
            self.used(gone)
        return gone

    def reset(self) -> None:
        """Nothing is here."""
        self._next.clear()

    def _of_all(self, count: int, kept: AbstractSet[OffloadKey], req: ReqContext) -> dict[OffloadKey, int] | None:
        """The first victims that can go, whosesoever they are."""
        order, chosen, busy = self._policy.victims(), dict[OffloadKey, int](), list[OffloadKey]()
        while len(chosen) < count:
            batch = list(islice(order, max(count - len(chosen), _BATCH)))
            if not batch:
                break
            rows = self._index.find(batch)
            if self._index.all_evictable(rows) and kept.isdisjoint(batch):
                chosen.update(zip(batch, rows, strict=True))  # type: ignore[arg-type]  # none of them is None
            else:
                chosen.update(self._free_to_go(batch, rows, kept, busy))
        del order
        self._were_busy(busy, req)
        if len(chosen) < count:
            return None
        return chosen if len(chosen) == count else dict(islice(chosen.items(), count))

    def _of_tenants(
        self, own: Mapping[bytes, int], count: int, kept: AbstractSet[OffloadKey], req: ReqContext
    ) -> dict[OffloadKey, int] | None:
        """As many of each tenant over its quota as it must give, and beyond them whatever goes first."""
        left, chosen, busy = dict(own), dict[OffloadKey, int](), list[OffloadKey]()
        for name in own:
            known = list(self._next.pop(name, ()))
            gone = self._free_to_go(known, self._index.find(known), kept, [])
            chosen.update(islice(gone.items(), left[name]))
            left[name] -= min(len(gone), left[name])
            self._next[name] = dict.fromkeys(key for key in gone if key not in chosen)
        others = count - sum(own.values())
        order = self._policy.victims()
        while others > 0 or any(left.values()):
            batch = list(islice(order, max(count, _BATCH)))
            if not batch:
                break
            found = self._free_to_go(batch, self._index.find(batch), kept, busy)
            for key, row in found.items():
                name = tenant(key)
                if key in chosen:
                    continue
                if left.get(name):
                    left[name] -= 1
                    chosen[key] = row
                elif others > 0:
                    others -= 1
                    chosen[key] = row
        else:
            self._look_ahead(order, own)
        del order
        self._were_busy(busy, req)
        return chosen if others <= 0 and not any(left.values()) else None

    def _look_ahead(self, order: Iterator[OffloadKey], own: Mapping[bytes, int]) -> None:
        """Remember which blocks of these tenants come next."""
        for key in islice(order, _NEXT):
            name = tenant(key)
            if name in own and len(self._next[name]) < _NEXT:
                self._next[name][key] = None

    def _free_to_go(
        self,
        keys: Sequence[OffloadKey],
        rows: Sequence[int | None],
        kept: AbstractSet[OffloadKey],
        busy: list[OffloadKey],
    ) -> dict[OffloadKey, int]:
        """Those of these that can go; the others that are here are added to `busy`."""
        found: dict[OffloadKey, int] = {}
        for key, row, idle in zip(keys, rows, self._index.evictable(rows), strict=True):
            if row is None:
                continue
            if idle and key not in kept:
                found[key] = row
            else:
                busy.append(key)
        return found

    def _were_busy(self, busy: Sequence[OffloadKey], req: ReqContext) -> None:
        if busy:
            self._policy.used(list(dict.fromkeys(busy)), req)
