"""The policy `foresight`: what is least likely to be asked for soon goes first. May import the offload room.

It learns when prompts are gone on from (`hazards`), and keeps the blocks for which that promises most hits for the room
and the time they take. Where such promises are worth less than plain recency, shadows of both tell (`shadow`), and it
orders by recency until they tell otherwise.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Final

from tensorway.metrics import Sample
from tensorway.offload import OffloadKey, PolicyContext, ReqContext
from tensorway_offload.policies.hazards import Hazards, Pair, Prior, Table
from tensorway_offload.policies.options import ForesightOptions
from tensorway_offload.policies.prior import CONVERSATIONS
from tensorway_offload.policies.runs import Runs
from tensorway_offload.policies.shadow import Guard

#: The kind of last blocks that were cut in the middle: nobody goes on from them.
_SPENT: Final = None
#: Prompts to remember the ends of, however little room there is; with more room, four for each block of it.
_LEAST_HORIZON: Final = 1024


class Foresight:
    """Orders by what is learned of when blocks come back."""

    def __init__(self, options: ForesightOptions, context: PolicyContext) -> None:
        self._prior = CONVERSATIONS if options.prior else Prior()
        self._capacity, self._caution = max(1, context.capacity), options.caution
        self.reset()

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._hazards = Hazards(self._prior, horizon=max(_LEAST_HORIZON, 4 * self._capacity))
        self._runs = Runs(self._capacity)
        self._guard = Guard(self._capacity, (self._by_value, Runs.by_use), self._caution, bool(self._prior.classes))

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """Until its request has ended, a block is of no class."""
        self._runs.claim(self._runs.places.there(keys), self._hazards.root, self._hazards.now)

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """What a request is, its end tells."""

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._runs.claim(keys, self._hazards.root, self._hazards.now)

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """Learn from it, and give its blocks the class that it has."""
        if not keys:
            return
        table = self._hazards.ended(keys)
        last = _SPENT if len(keys) > 1 and self._hazards.cuts_last() else table
        now, here = self._hazards.now, self._runs.places.there(keys)
        if last is _SPENT and here and here[-1] == keys[-1]:
            self._runs.claim((here.pop(),), _SPENT, now)
        self._runs.claim(here, table, now)
        self._guard.request(keys, last, table, now)

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._runs.places.drop(keys)

    def victims(self) -> Iterator[OffloadKey]:
        """See `EvictionPolicy`."""
        return self._by_value(self._runs) if self._guard.better else self._runs.by_use()

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._runs.places.drop(keys)

    def statistics(self) -> Sequence[Sample]:
        """What this order and plain recency would have found, each alone from the beginning."""
        names = ("foresight", "lru")
        rows = zip(names, self._guard.found, strict=True)
        return [Sample("offload_policy_hits_total", (("policy", name),), float(found)) for name, found in rows]

    def _by_value(self, runs: Runs) -> Iterator[OffloadKey]:
        return runs.by_value(self._value)

    def _value(self, kind: Hashable, since: int) -> float:
        return kind.value(self._hazards.now - since) if isinstance(kind, Table | Pair) else -1.0
