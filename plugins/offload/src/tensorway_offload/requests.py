"""Requests that are alive: what each has asked for, which rows are leased to it, and for how long it waits.

May import the core's offload room and the index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import attrs

from tensorway.offload import OffloadKey, ReqContext
from tensorway_offload.index import Index

#: A deadline that was over before anything began.
GIVEN_UP: Final = float("-inf")


@attrs.define(eq=False)
class Request:
    """A request, as far as the manager must remember it."""

    req: ReqContext
    #: All that it has asked for, found and stored, as it came; and whether the policy was told of its use.
    asked: dict[OffloadKey, bool] = attrs.field(factory=dict)
    #: Rows that are leased to it, by what was in them.
    held: dict[OffloadKey, int] = attrs.field(factory=dict)
    leased_until: float = 0.0
    #: Until when each block may be on its way to it; it is forgotten when the block is loaded.
    until: dict[OffloadKey, float] = attrs.field(factory=dict)
    #: The same for whatever it waits for since it last knew all.
    patience: float | None = None
    #: Rows of promotions for it that are under way.
    promoting: int = 0
    #: Its stores that are under way.
    storing: int = 0
    #: It asks for nothing any more.
    over: bool = False
    seen: float = 0.0

    def mention(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """Remember these; those that it has never mentioned before."""
        asked = self.asked
        fresh = [key for key in keys if key not in asked]
        asked.update(dict.fromkeys(fresh, False))
        return fresh

    def use(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """Those that it uses for the first time; what it has stored itself is not used when it is read again."""
        asked = self.asked
        fresh = [key for key in keys if not asked.get(key)]
        asked.update(dict.fromkeys(fresh, True))
        return fresh

    def deadline(self, key: OffloadKey, now: float, seconds: float) -> float:
        """Until when a block may be on its way: what begins while something else is awaited gets no more time."""
        known = self.until.get(key)
        if known is None:
            self.patience = now + seconds if self.patience is None else self.patience
            known = self.until[key] = self.patience
        return known


class Requests:
    """Live requests and their leases, each in the order in which they run out."""

    def __init__(self, index: Index, lease_seconds: float, request_seconds: float) -> None:
        self._index = index
        self._lease, self._life = lease_seconds, request_seconds
        self._live: OrderedDict[str, Request] = OrderedDict()
        self._leased: OrderedDict[str, Request] = OrderedDict()

    def of(self, req: ReqContext, now: float) -> Request:
        """What is known of a request, which may be new."""
        found = self._live.get(req.request)
        if found is None:
            found = self._live[req.request] = Request(req)
        else:
            self._live.move_to_end(req.request)
        found.seen = now
        return found

    def lease(self, request: Request, keys: Sequence[OffloadKey], rows: Sequence[int], now: float) -> None:
        """These ready rows stay for it, and all that it has been leased before stays as long."""
        held = request.held
        fresh = [(key, row) for key, row in zip(keys, rows, strict=True) if held.get(key) != row] if held else None
        if fresh is None:
            held.update(zip(keys, rows, strict=True))
            rows = list(held.values())  # one hold for a key that was asked twice
        else:
            fresh = list(dict(fresh).items())
            # A row that was leased under a key whose block has been forgotten since.
            self._index.release([held[key] for key, _ in fresh if key in held])
            held.update(fresh)
            rows = [row for _, row in fresh]
        self._index.hold(rows)
        if held:
            request.leased_until = now + self._lease
            self._leased[request.req.request] = request
            self._leased.move_to_end(request.req.request)

    def consume(self, request: Request, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """Hold these ready rows once each for a load; their leases become that hold."""
        held, until = request.held, request.until
        if not held:
            self._index.hold(rows)
        else:
            had = [held.pop(key, None) for key in keys]
            if had != rows:
                self._index.hold([row for row, old in zip(rows, had, strict=True) if row != old])
                self._index.release([old for row, old in zip(rows, had, strict=True) if old not in (None, row)])
            self._unless_empty(request)
        if until:
            for key in keys:
                until.pop(key, None)

    def end(self, req: ReqContext) -> Request | None:
        """It asks for nothing any more, and nothing is leased to it."""
        request = self._live.pop(req.request, None)
        if request is not None:
            request.over = True
            self.drop(request)
        return request

    def drop(self, request: Request) -> None:
        """End its leases."""
        self._index.release(request.held.values())
        request.held.clear()
        self._unless_empty(request)

    def expired(self, now: float) -> int:
        """End the leases whose time is over; how many there were."""
        count = 0
        while self._leased:
            request = next(iter(self._leased.values()))
            if request.leased_until > now:
                break
            self.drop(request)
            count += 1
        return count

    def silent(self, now: float) -> Iterable[ReqContext]:
        """Requests that have said nothing for so long that they must have ended."""
        for request in list(self._live.values()):
            if request.seen + self._life > now:
                break
            yield request.req

    def reset(self) -> None:
        """Nothing of what they know is true any more."""
        for request in list(self._leased.values()):
            self.drop(request)
        for request in self._live.values():
            request.asked.clear()
            request.until.clear()
            request.patience = None

    def _unless_empty(self, request: Request) -> None:
        if not request.held:
            self._leased.pop(request.req.request, None)


def unique(keys: Collection[OffloadKey]) -> list[OffloadKey]:
    """Each key once, in their order."""
    return list(dict.fromkeys(keys))
