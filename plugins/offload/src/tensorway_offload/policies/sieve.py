"""The policy `sieve`: one queue, and a hand that spares what was used since it last came by.

May import the offload room.
As in Zhang and others, "SIEVE is simpler than LRU" (NSDI 2024): the hand goes from old to new; what was used it spares
once, and what was not it evicts, and stays there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorway.offload import OffloadKey, PolicyContext, ReqContext


class _Node:
    __slots__ = ("key", "newer", "older", "used")

    def __init__(self, key: OffloadKey | None) -> None:
        self.key = key
        self.used = False
        self.newer = self.older = self


class Sieve:
    """One queue with a hand."""

    def __init__(self, context: PolicyContext) -> None:
        self.reset()

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._nodes: dict[OffloadKey, _Node] = {}
        #: Between the newest and the oldest, where the hand passes from the one to the other.
        self._end = _Node(None)
        self._hand = self._end

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        for key in keys:
            node = self._nodes.get(key)
            if node is not None:
                node.used = True

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """What is not here is in no queue."""

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """The head of a prefix is the newest of it, and so the last that the hand comes to."""
        for key in reversed(keys):
            if key in self._nodes:
                continue
            node = self._nodes[key] = _Node(key)
            node.older, node.newer = self._end.older, self._end
            self._end.older.newer = node
            self._end.older = node

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """A queue has no order but that of coming."""

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        for key in keys:
            node = self._nodes.pop(key, None)
            if node is not None:
                self._unlink(node)

    def victims(self) -> Iterator[OffloadKey]:
        """See `EvictionPolicy`."""
        node, spared = self._hand, []
        for _ in range(len(self._nodes) + 1):
            if node.key is not None and node.used:
                spared.append(node.key)
            elif node.key is not None:
                yield node.key
            node = node.newer
        yield from spared

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """The hand goes to each of these in turn, and spares what is between."""
        for key in keys:
            goal = self._nodes.pop(key, None)
            if goal is None:
                continue
            while self._hand is not goal:
                self._hand.used = False
                self._hand = self._hand.newer
            self._unlink(goal)

    def _unlink(self, node: _Node) -> None:
        if self._hand is node:
            self._hand = node.newer
        node.older.newer, node.newer.older = node.newer, node.older
