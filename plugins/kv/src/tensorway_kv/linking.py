"""All links of one side: one for each life of an engine, and those that are over and not yet ended.

May import the core and this package's links. One thread uses it; those of the links do what waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Generic

from tensorway_kv.links import BoundT, Link, Side


class Links(Generic[BoundT]):
    """Links by engine and life."""

    def __init__(self, side: Side[BoundT]) -> None:
        self._side = side
        self._links: dict[tuple[str, str], Link[BoundT]] = {}
        #: Their threads may still have something to say.
        self._over: list[Link[BoundT]] = []
        self._told: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Link[BoundT]]:
        return iter(list(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def to(self, engine: str, incarnation: str) -> Link[BoundT]:
        """To a life of an engine; a new one if the connection broke, and the engine may live."""
        key = engine, incarnation
        link = self._links.get(key)
        if link is not None and link.lost and link.hopeless is None:
            self._over.append(link)
            link = None
        if link is None:
            link = self._links[key] = Link(self._side, *key)
        return link

    def replaced(self, engine: str, incarnation: str) -> None:
        """An engine lives this life now; those before it are over."""
        for link in (*self, *self._over):
            if link.engine == engine and link.incarnation != incarnation:
                link.lose("lost", f"it was replaced by its incarnation {incarnation[:12]}")

    def tidy(self, used: Collection[Link[BoundT]]) -> None:
        """Let go of lives that are over, once nobody waits for them."""
        for key, link in list(self._links.items()):
            if link.hopeless is not None and link not in used:
                self._over.append(link)
                del self._links[key]
        for link in list(self._over):
            if link.ended:
                self._over.remove(link)
                self._told.update(link.counts)
            elif not link.watching:
                # Where some ranks are lost and others were asked to write, these are still looked after: a connection
                # that is let go of here cannot tell that a process has ended, and memory would be held back as from
                # one that may go on.
                link.stop()

    def told(self) -> Counter[str]:
        """What became of all messages so far."""
        return sum((Counter(link.counts) for link in (*self, *self._over)), Counter(self._told))

    def connected(self) -> int:
        """How many are connected."""
        return sum(link.bound is not None and not link.lost for link in self)

    def stop(self) -> None:
        """Let all threads end."""
        for link in (*self, *self._over):
            link.stop()

    def close(self, until: float) -> None:
        """Let them end, and wait until they have."""
        self.stop()
        for link in (*self, *self._over):
            link.close(max(0.0, until - time.monotonic()))
