"""The policy `s3fifo`: a short queue that most blocks only pass through. May import the offload room and `recency`.

As in Yang and others, "FIFO queues are all you need for cache eviction" (SOSP 2023): what is new waits in a short
queue; what was used there more than once, or was evicted from it not long ago, goes to the long one, and each use, of
three at most, buys another round there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from tensorway.offload import OffloadKey, PolicyContext, ReqContext
from tensorway_offload.policies.recency import Recency

_MOST: Final = 3
#: Blocks whose turn came and went that one call moves, beside its own.
_SETTLE: Final = 64


class S3Fifo:
    """Three queues."""

    def __init__(self, context: PolicyContext) -> None:
        self._capacity = max(1, context.capacity)
        self._short_target = max(1, self._capacity // 10)
        self.reset()

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._short, self._long = Recency(self._capacity), Recency(self._capacity)
        self._gone = Recency(self._capacity)
        #: Only of those that were used again.
        self._uses: dict[OffloadKey, int] = {}

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        for key in (*self._short.there(keys), *self._long.there(keys)):
            self._uses[key] = min(_MOST, self._uses.get(key, 0) + 1)

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """What was evicted not long ago is known when it is stored."""

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        here = {*self._short.there(keys), *self._long.there(keys)}
        again = frozenset(self._gone.discard(keys))
        self._long.add([key for key in keys if key in again and key not in here])
        self._short.add([key for key in keys if key not in again and key not in here])

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """Queues have no order but that of coming."""

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._short.discard(keys)
        self._long.discard(keys)
        for key in keys:
            self._uses.pop(key, None)

    def victims(self) -> Iterator[OffloadKey]:
        """See `EvictionPolicy`. What is passed over is moved when somebody was evicted behind it."""
        short, waiting = iter(self._short), len(self._short)
        promoted: deque[tuple[OffloadKey, int]] = deque()
        long = self._rounds(promoted)
        while True:
            if waiting and (waiting >= self._short_target or (not self._long and not promoted)):
                waiting -= 1
                key = next(short)
                if self._uses.get(key, 0) > 1:
                    promoted.append((key, 0))
                else:
                    yield key
            elif (following := next(long, None)) is not None:
                yield following
            elif waiting:
                waiting -= 1
                yield next(short)
            else:
                return

    def _rounds(self, promoted: deque[tuple[OffloadKey, int]]) -> Iterator[OffloadKey]:
        """The long queue, each as often as its uses say, then what was promoted meanwhile."""
        again: deque[tuple[OffloadKey, int]] = deque()
        for key in self._long:
            if uses := self._uses.get(key, 0):
                again.append((key, uses - 1))
            else:
                yield key
        while again or promoted:
            again.extend(promoted)
            promoted.clear()
            key, uses = again.popleft()
            if uses:
                again.append((key, uses - 1))
            else:
                yield key

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`; then those at the ends of the queues that were passed over move on."""
        from_short = self._short.discard(keys)
        from_long = self._long.discard(keys)
        self._gone.add(from_short[::-1])
        if len(self._gone) > self._capacity:
            self._gone.discard(self._gone.oldest(len(self._gone) - self._capacity))
        for key in keys:
            self._uses.pop(key, None)
        if from_short:
            self._promote(2 * len(keys) + _SETTLE)
        if from_long:
            self._go_round(2 * len(keys) + _SETTLE)

    def _promote(self, most: int) -> None:
        passed = []
        for key, _ in zip(self._short, range(most), strict=False):
            if self._uses.get(key, 0) <= 1:
                break
            passed.append(key)
        self._short.discard(passed)
        self._long.add(passed[::-1])
        for key in passed:
            del self._uses[key]

    def _go_round(self, most: int) -> None:
        passed = []
        for key, _ in zip(self._long, range(most), strict=False):
            uses = self._uses.get(key, 0)
            if not uses:
                break
            passed.append(key)
            if uses > 1:
                self._uses[key] = uses - 1
            else:
                del self._uses[key]
        self._long.add(passed[::-1])
