"""Keys in the order of their last use, in batches: what most policies here are made of. May import the offload room.

A batch of keys that are used together is one `Span`, which costs a tuple and a few words for all of them. A key that is
used again only changes its place; what is left of it in its old span is stale, and is cleaned away a bounded number at
a time. Nothing is ever rebuilt in one call, however many keys there are: a dict of a million keys takes 50 ms to grow,
so places are in many small ones.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from tensorway.offload import OffloadKey

#: Keys of one dict: growing it is not felt.
_SHARD: Final = 1024
_MOST_SHARDS: Final = 1 << 16
#: Keys of one span: looking for what is left of it is not felt.
SPAN: Final = 256
#: Calls of few keys share one span of so many.
_SMALL: Final = 32
#: Stale entries that each call cleans away, beside twice as many as it makes.
_CLEAN: Final = 64


class Span:
    """Keys that were used together, the next to go first; a link of a ring."""

    __slots__ = ("after", "before", "keys", "live", "number", "since")

    def __init__(self, number: int, keys: tuple[OffloadKey, ...] = ()) -> None:
        #: What stands for it where its keys are looked up.
        self.number = number
        #: A tuple: garbage collection does not go through tuples of bytes again and again, as it does through lists.
        self.keys = keys
        #: How many of them are still of this span.
        self.live = 0
        #: When that was, by its owner's clock.
        self.since = 0
        self.before = self.after = self

    def join(self, end: Span) -> None:
        """Become the last before `end`."""
        self.before, self.after = end.before, end
        end.before.after = self
        end.before = self


class Places:
    """In which span each key is: spans in rings, whose keys can only be claimed by later spans or dropped.

    Keys lead to numbers, not to spans, for garbage collection does not look into dicts of bytes and numbers.
    """

    def __init__(self, capacity: int) -> None:
        shards = 1 << (min(max(capacity, 1) // _SHARD, _MOST_SHARDS) - 1).bit_length() if capacity > _SHARD else 1
        self.mask = shards - 1
        self.shards: list[dict[OffloadKey, int]] = [{} for _ in range(shards)]
        #: How many keys there are.
        self.count = 0
        self.spans: dict[int, Span] = {}
        self._numbers = itertools.count(1)
        self._sparse: deque[Span] = deque()

    def get(self, key: OffloadKey) -> int | None:
        """The number of its span; None if it is in none."""
        return self.shards[hash(key) & self.mask].get(key)

    def there(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Those of these keys that are in a span."""
        shards, mask = self.shards, self.mask
        return [key for key in keys if key in shards[hash(key) & mask]]

    def left(self, span: Span) -> Iterator[OffloadKey]:
        """What is still in it, the next to go first."""
        shards, mask, number = self.shards, self.mask, span.number
        return (key for key in span.keys if shards[hash(key) & mask].get(key) == number)

    def claim(self, keys: Sequence[OffloadKey]) -> Span:
        """A new span of these, the last of them to go first, wherever they have been; in no ring yet."""
        shards, mask = self.shards, self.mask
        span = Span(next(self._numbers))
        number, mine = span.number, []
        previous, run = None, 0
        for key in reversed(keys):
            shard = shards[hash(key) & mask]
            old = shard.get(key)
            if old != previous:
                self._lose(previous, run)
                previous, run = old, 0
            if old == number:  # twice in one list
                continue
            run += 1
            shard[key] = number
            mine.append(key)
        self._lose(previous, run)
        span.keys, span.live = tuple(mine), len(mine)
        self.spans[number] = span
        self.count += len(mine)
        self._clean(2 * len(keys))
        return span

    def extend(self, span: Span, keys: Sequence[OffloadKey]) -> None:
        """Append to a short span that is the last of its ring; what is in it of these keys, live or stale, goes."""
        for key in reversed(keys):
            shard = self.shards[hash(key) & self.mask]
            old = shard.get(key)
            span.keys = (*(other for other in span.keys if other != key), key)
            if old != span.number:
                shard[key] = span.number
                span.live += 1
                self.count += 1
                self._lose(old, 1)

    def drop(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """These are in no span any more; returns those that were in one."""
        shards, mask = self.shards, self.mask
        gone = []
        previous, run = None, 0
        for key in keys:
            old = shards[hash(key) & mask].pop(key, None)
            if old is None:
                continue
            gone.append(key)
            if old != previous:
                self._lose(previous, run)
                previous, run = old, 0
            run += 1
        self._lose(previous, run)
        self._clean(2 * len(keys))
        return gone

    def _lose(self, number: int | None, count: int) -> None:
        """So many keys of a span are of another now, or gone."""
        span = self.spans.get(number) if number is not None and count else None
        if span is None:
            return
        self.count -= count
        span.live -= count
        if not span.live:
            span.before.after, span.after.before = span.after, span.before
            del self.spans[span.number]
        elif span.live <= len(span.keys) // 2 < span.live + count:
            self._sparse.append(span)

    def _clean(self, budget: int) -> None:
        budget += _CLEAN
        while self._sparse and budget > 0:
            span = self._sparse.popleft()
            if span.live and span.live <= len(span.keys) // 2:
                budget -= len(span.keys)
                span.keys = tuple(self.left(span))


class Recency:
    """Keys by their last use. In a batch the first key is the most recent one: the head of a prefix goes last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget all keys."""
        self._places = Places(self._capacity)
        self._ring = Span(0)

    def __len__(self) -> int:
        return self._places.count

    def __contains__(self, key: OffloadKey) -> bool:
        return self._places.get(key) is not None

    def __iter__(self) -> Iterator[OffloadKey]:
        """The least recent first."""
        span = self._ring.after
        while span is not self._ring:
            yield from self._places.left(span)
            span = span.after

    def there(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Those of these keys that are here."""
        return self._places.there(keys)

    def add(self, keys: Sequence[OffloadKey]) -> None:
        """These are the most recent now, whether they were here or not."""
        last = self._ring.before
        if len(keys) <= _SMALL and last is not self._ring and len(last.keys) + len(keys) <= _SMALL:
            self._places.extend(last, keys)
            return
        for end in range(len(keys), 0, -SPAN):
            span = self._places.claim(keys[max(0, end - SPAN) : end])
            span.join(self._ring)

    def refresh(self, keys: Iterable[OffloadKey]) -> None:
        """Those of these that are here are the most recent now."""
        self.add(self._places.there(keys))

    def discard(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """These are here no more; returns those that were."""
        return self._places.drop(keys)

    def oldest(self, count: int) -> list[OffloadKey]:
        """The `count` least recent keys, or all."""
        return [key for _, key in zip(range(count), self, strict=False)]
