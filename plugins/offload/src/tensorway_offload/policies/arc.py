"""The policy `arc`: adapts between recency and frequency. May import the offload room and `recency`.

As in Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST 2003): what was used once, what was
used more often, and of each what was evicted last. A block that comes back from there goes to those that were used more
often, and moves the line between the two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from tensorway.offload import OffloadKey, PolicyContext, ReqContext
from tensorway_offload.policies.recency import Recency


class Arc:
    """Adaptive replacement."""

    def __init__(self, context: PolicyContext) -> None:
        self._capacity = max(1, context.capacity)
        self.reset()

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._once, self._often = Recency(self._capacity), Recency(self._capacity)
        self._once_gone, self._often_gone = Recency(self._capacity), Recency(self._capacity)
        #: How many blocks those that were used once may have: the paper's p.
        self._line = 0.0
        #: Were evicted not long ago, and are about to be stored again.
        self._back: OrderedDict[OffloadKey, None] = OrderedDict()

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._once.discard(here := [*self._once.there(keys), *self._often.there(keys)])
        both = frozenset(here)
        self._often.add([key for key in keys if key in both])

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """Those that were evicted not long ago say on which side room is missing."""
        for gone, other, up in ((self._once_gone, self._often_gone, 1), (self._often_gone, self._once_gone, -1)):
            for key in gone.there(keys):
                self._line += up * max(1.0, len(other) / max(1, len(gone)))
                self._line = min(float(self._capacity), max(0.0, self._line))
                gone.discard((key,))
                self._back[key] = None
        while len(self._back) > self._capacity:
            self._back.popitem(last=False)

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        again = {key for key in keys if key in self._back}
        for key in again:
            del self._back[key]
        again.update(self._often.there(keys))
        for gone in (self._once_gone, self._often_gone):
            gone.discard(keys)
        self._once.discard([key for key in keys if key in again])
        self._often.add([key for key in keys if key in again])
        self._once.add([key for key in keys if key not in again])
        self._trim()

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """The order of tokens, in each of the two; that it found what it stored itself is no second use."""
        self._once.refresh(keys)
        self._often.refresh(keys)

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._once.discard(keys)
        self._often.discard(keys)

    def victims(self) -> Iterator[OffloadKey]:
        """See `EvictionPolicy`."""
        once, often = iter(self._once), iter(self._often)
        left = len(self._once)
        while left:
            key = next(once) if left > self._line else next(often, None)
            if key is None:
                break
            left -= left > self._line
            yield key
        yield from once
        yield from often

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """Those that were used once and those that were used more often are remembered apart."""
        # A batch has its most recent key first; these come the other way round.
        self._once_gone.add(self._once.discard(keys)[::-1])
        self._often_gone.add(self._often.discard(keys)[::-1])
        self._trim()

    def _trim(self) -> None:
        """As in the paper: of the one side no more than fit, of all no more than twice as many."""
        much = len(self._once) + len(self._once_gone) - self._capacity
        if much > 0:
            self._once_gone.discard(self._once_gone.oldest(much))
        all_of_them = len(self._once) + len(self._often) + len(self._once_gone) + len(self._often_gone)
        if all_of_them > 2 * self._capacity:
            self._often_gone.discard(self._often_gone.oldest(all_of_them - 2 * self._capacity))
