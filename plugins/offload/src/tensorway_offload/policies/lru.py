"""The policy `lru`: what was used longest ago goes first, and of one prefix its tail. May import the offload room.

That order needs no tree: as the head of every prefix is used with each of its continuations, it is never older than
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorway.offload import OffloadKey, PolicyContext, ReqContext
from tensorway_offload.policies.recency import Recency


class Lru:
    """Least recently used."""

    def __init__(self, context: PolicyContext) -> None:
        self._order = Recency(context.capacity)

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._order.refresh(keys)

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """What is not here yet has no place in this order."""

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._order.add(keys)

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """All of it as one: parts that were stored one after the other are in the order of their tokens again."""
        self._order.refresh(keys)

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._order.discard(keys)

    def victims(self) -> Iterator[OffloadKey]:
        """See `EvictionPolicy`."""
        return iter(self._order)

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._order.discard(keys)

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._order.clear()
