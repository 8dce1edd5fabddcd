"""In which order rows go: as a policy says it, or, for the policy `lru`, from the rows themselves.

May import the core's offload room, the index and the policies. A policy by keys looks each of them up anew; that costs
more than all else that a manager does, and the default needs no key to know which row was used longest ago.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final, Protocol

from tensorway.offload import EvictionPolicy, OffloadKey, ReqContext
from tensorway_offload.index import Index
from tensorway_offload.policies.lru import Lru

#: Victims that are taken from a policy in one go, or rows of one span.
_BATCH: Final = 256
_ROW: Final = "i"
#: Calls of few rows share a span.
_SMALL: Final = 32


class Order(Protocol):
    """What a manager tells and asks; as `EvictionPolicy`, with the row of each key, and rows in place of victims."""

    def used(self, keys: Sequence[OffloadKey], rows: Sequence[int], req: ReqContext) -> None: ...

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None: ...

    def stored(self, keys: Sequence[OffloadKey], rows: Sequence[int], req: ReqContext) -> None: ...

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None: ...

    def removed(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None: ...

    def victims(self) -> Iterator[list[int]]: ...

    def evicted(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None: ...

    def reset(self) -> None: ...


class ByKey:
    """The order of any policy."""

    def __init__(self, policy: EvictionPolicy, index: Index) -> None:
        self._policy, self._index = policy, index
        self.wanted, self.ended, self.reset = policy.wanted, policy.ended, policy.reset

    def used(self, keys: Sequence[OffloadKey], rows: Sequence[int], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._policy.used(keys, req)

    def stored(self, keys: Sequence[OffloadKey], rows: Sequence[int], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._policy.stored(keys, req)

    def removed(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """See `EvictionPolicy`."""
        self._policy.removed(keys)

    def victims(self) -> Iterator[list[int]]:
        """Rows of what the policy proposes, as far as it is here."""
        order = self._policy.victims()
        while batch := list(islice(order, _BATCH)):
            yield [row for row in self._index.find(batch) if row is not None]

    def evicted(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """See `EvictionPolicy`."""
        self._policy.evicted(keys)


class LruRows:
    """The order of the policy `lru`: rows in spans, of which each row belongs to the last one that it was put into.

    What is left of a row in an older span is cleaned away a bounded number at a time, as spans come.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self.reset()

    def reset(self) -> None:
        """Nothing is here."""
        #: The span of each row; 0 for none.
        self._of = [0] * self._index.capacity
        #: The oldest first, and in each the first to go. Arrays, for garbage collection goes through all of a list.
        self._spans: dict[int, array[int]] = {}
        #: Spans that are still to be cleaned in this round, and the one that was cleaned last.
        self._sweep: deque[int] = deque()
        self._number = self._swept = 0
        #: Rows in all spans, with those that are stale.
        self._entries = 0
        #: What was put in last, which need not be put there again.
        self._last: Sequence[int] = ()

    def used(self, keys: Sequence[OffloadKey], rows: Sequence[int], req: ReqContext) -> None:
        """These are the last to go, the head of a prefix after its tail."""
        self._add(rows)

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """What is not here has no place in this order."""

    def stored(self, keys: Sequence[OffloadKey], rows: Sequence[int], req: ReqContext) -> None:
        """As if they were used."""
        self._add(rows)

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """All of it as one: parts that were stored one after the other are in the order of their tokens again."""
        of = self._of
        self._add([row for row in self._index.find(keys) if row is not None and of[row]])

    def removed(self, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """These have no place any more."""
        of, self._last = self._of, ()
        if any(of[row] == self._number for row in rows):
            self._number += 1  # or what is stale of a row would belong to the newest span again, once it is put there
        for row in rows:
            of[row] = 0

    evicted = removed

    def victims(self) -> Iterator[list[int]]:
        """What was used longest ago comes first. What is stale is not looked at twice."""
        of, spans = self._of, self._spans
        for number, rows in spans.items():
            found = [row for row in rows if of[row] == number]
            if len(found) < len(rows):
                spans[number] = array(_ROW, found)
                self._entries -= len(rows) - len(found)
            if found:
                yield found

    def _add(self, rows: Sequence[int]) -> None:
        if rows == self._last:
            return
        self._last, of = rows, self._of
        if len(rows) <= _SMALL:
            last = self._spans.get(self._number)
            if last is not None and len(last) + len(rows) <= _SMALL and all(of[row] != self._number for row in rows):
                self._put(last, rows)
                return
        for end in range(len(rows), 0, -_BATCH):
            self._number += 1
            span = self._spans[self._number] = array(_ROW)
            self._put(span, rows[max(0, end - _BATCH) : end])
        self._clean(2 * len(rows) + _SMALL)

    def _put(self, span: array[int], rows: Sequence[int]) -> None:
        of, number = self._of, self._number
        for row in rows:
            of[row] = number
        span.extend(array(_ROW, rows[::-1]))
        self._entries += len(rows)

    def _clean(self, budget: int) -> None:
        """Go on around all spans: keep of each what still belongs to it, and put two together that are short."""
        of, spans = self._of, self._spans
        while budget > 0 and self._entries > self._index.present * 3 // 2:
            if not self._sweep:
                self._sweep, self._swept = deque(spans), 0
                budget -= len(spans) >> 4
            number = self._sweep.popleft()
            rows = spans[number]
            budget -= len(rows) + 1
            left = [row for row in rows if of[row] == number]
            before: Sequence[int] = spans.get(self._swept, ())
            self._entries += len(left) - len(rows)
            if self._swept and len(before) + len(left) <= _BATCH:
                self._entries -= len(spans.pop(self._swept))
                before = [row for row in before if of[row] == self._swept]
                for row in before:
                    of[row] = number
                left = [*before, *left]
                self._entries += len(before)
            spans[number], self._swept = array(_ROW, left), number


def order_of(policy: EvictionPolicy, index: Index) -> Order:
    """The order of a policy; that of `lru` is known here, so that it need not be asked."""
    return LruRows(index) if type(policy) is Lru else ByKey(policy, index)
