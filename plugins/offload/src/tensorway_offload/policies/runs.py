"""Keys in runs, one for each request, of the class that its request has. May import the offload room and `recency`.

Within a run the tail goes first. Which run goes next is decided between the oldest and the newest one of each class:
with age a class can become worth less or worth more.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence

from tensorway.offload import OffloadKey
from tensorway_offload.policies.recency import Places, Span


class Runs:
    """The order of one cache."""

    def __init__(self, capacity: int) -> None:
        self.places = Places(capacity)
        self._rings: dict[Hashable, Span] = {}

    def claim(self, keys: Sequence[OffloadKey], kind: Hashable, now: int) -> None:
        """These were used together now, by a request of this class."""
        if not keys:
            return
        span = self.places.claim(keys)
        span.since = now
        ring = self._rings.get(kind)
        if ring is None:
            ring = self._rings[kind] = Span(0)
        span.join(ring)

    def by_use(self) -> Iterator[OffloadKey]:
        """All keys, those first that were used longest ago."""
        heads = [(ring.after.number, ring.after) for ring in self._rings.values() if ring.after is not ring]
        heapq.heapify(heads)
        while heads:
            _, span = heapq.heappop(heads)
            yield from self.places.left(span)
            if span.after.number:
                heapq.heappush(heads, (span.after.number, span.after))

    def by_value(self, value: Callable[[Hashable, int], float]) -> Iterator[OffloadKey]:
        """All keys, those first whose class is worth least at their age; `value` is asked with when they were used."""
        heads: list[tuple[float, int, bool, Hashable, Span]] = []
        for kind, ring in self._rings.items():
            for older, span in ((True, ring.after), (False, ring.before)):
                if span is not ring:
                    heads.append((value(kind, span.since), span.number, older, kind, span))
        heapq.heapify(heads)
        seen = set()
        while heads:
            _, number, older, kind, span = heapq.heappop(heads)
            if number in seen:
                continue
            seen.add(number)
            yield from self.places.left(span)
            following = span.after if older else span.before
            if following.number and following.number not in seen:
                heapq.heappush(heads, (value(kind, following.since), following.number, older, kind, following))
