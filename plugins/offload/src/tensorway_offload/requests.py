"""Requests that are alive: what each has asked for, which rows are leased to it, and for how long it waits.

May import the core's offload room and the index.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Final

import attrs

from tensorway.offload import OffloadKey, ReqContext
from tensorway_offload.index import Index

#: Lists that are remembered as they came, before they are put together.
_MOST_HEARD: Final = 8
#: A deadline that was over before anything began.
GIVEN_UP: Final = float("-inf")


@attrs.define(eq=False)
class Request:
    """A request, as far as the manager must remember it."""

    req: ReqContext
    #: All that it has asked for, found and stored, as it came; and whether the policy was told of its use.
    asked: dict[OffloadKey, bool] = attrs.field(factory=dict)
    #: Lists of keys that it has asked for, and that are not among those yet.
    heard: list[list[OffloadKey]] = attrs.field(factory=list)
    used_any: bool = False
    #: What is leased to it, as it was found, if there is nothing in `held`: most leases are loaded as they are.
    found: tuple[list[OffloadKey], list[int]] | None = None
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

    @property
    def leased(self) -> int:
        """How many rows are leased to it."""
        return len(self.held) if self.found is None else len(self.found[1])

    def hear(self, keys: Sequence[OffloadKey]) -> None:
        """It asks for these; who waits asks for the same again and again."""
        if not self.heard or self.heard[-1] != keys:
            self.heard.append(list(keys))
            if len(self.heard) > _MOST_HEARD:
                self.mention(())

    def mention(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """Remember these; those that it has never mentioned before."""
        heard, self.heard = self.heard, []
        for each in heard:
            self.mention(each)
        if not self.asked:
            self.asked = dict.fromkeys(keys, False)
            return list(self.asked)
        asked = self.asked
        fresh = [key for key in keys if key not in asked]
        asked.update(dict.fromkeys(fresh, False))
        return fresh

    def use(self, keys: Sequence[OffloadKey]) -> Sequence[OffloadKey]:
        """Those that it uses for the first time; what it has stored itself is not used when it is read again."""
        fresh = keys if not self.used_any else [key for key in keys if not self.asked.get(key)]
        self.took(fresh)
        return fresh

    def took(self, keys: Sequence[OffloadKey]) -> None:
        """It has used these, or stored them."""
        self.used_any = self.used_any or bool(keys)
        if not self.asked and len(self.heard) == 1 and self.heard[0] == keys:
            self.asked, self.heard = dict.fromkeys(keys, True), []
            return
        if self.heard:
            self.mention(())
        self.asked.update(dict.fromkeys(keys, True))

    def all_asked(self) -> list[OffloadKey]:
        """All that it has asked for; it is forgotten."""
        self.mention(())
        asked, self.asked, self.used_any = list(self.asked), {}, False
        return asked

    def spill(self) -> list[int]:
        """Lease by key what was leased as it was found; rows that were held twice for it, once too often."""
        if self.found is None:
            return []
        (keys, rows), self.found = self.found, None
        self.held.update(zip(keys, rows, strict=True))
        if len(self.held) == len(rows):
            return []
        over = Counter(rows)
        over.subtract(self.held.values())
        return list(over.elements())

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
        if not request.leased:
            request.found = (list(keys), list(rows))
            self._index.hold(rows)
        elif request.found is None or request.found[0] != keys or request.found[1] != rows:
            self._index.release(request.spill())
            held = request.held
            fresh = {key: row for key, row in zip(keys, rows, strict=True) if held.get(key) != row}
            # A row that was leased under a key whose block has been forgotten since.
            stale = [held[key] for key in fresh if key in held]
            held.update(fresh)
            self._index.hold(fresh.values())
            self._index.release(stale)
        if request.leased:
            request.leased_until = now + self._lease
            self._leased[request.req.request] = request
            self._leased.move_to_end(request.req.request)

    def consume(self, request: Request, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        """Hold these ready rows once each for a load; their leases become that hold."""
        if request.found is not None and request.found[0] == keys and request.found[1] == rows:
            request.found = None
        elif not request.leased:
            self._index.hold(rows)
        else:
            self._index.release(request.spill())
            had = [request.held.pop(key, None) for key in keys]
            self._index.hold([row for row, old in zip(rows, had, strict=True) if row != old])
            self._index.release([old for row, old in zip(rows, had, strict=True) if old is not None and old != row])
        self._unless_empty(request)
        for key in keys if request.until else ():
            request.until.pop(key, None)

    def unlease(self, places: Mapping[OffloadKey, int]) -> None:
        """What was in these rows is forgotten: nobody can load it, and no lease is worth its row."""
        for request in list(self._leased.values()):
            if request.found is not None and places.keys().isdisjoint(request.found[0]):
                continue
            self._index.release(request.spill())
            held = request.held
            self._index.release([held.pop(key) for key, row in places.items() if held.get(key) == row])
            self._unless_empty(request)

    def end(self, req: ReqContext) -> Request | None:
        """It asks for nothing any more, and nothing is leased to it."""
        request = self._live.pop(req.request, None)
        if request is not None:
            request.over = True
            self.drop(request)
        return request

    def drop(self, request: Request) -> None:
        """End its leases."""
        held = [*request.held.values(), *(request.found[1] if request.found is not None else ())]
        request.found = None
        request.held.clear()
        self._index.release(held)
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
        silent = takewhile(lambda request: request.seen + self._life <= now, self._live.values())
        return [request.req for request in silent]

    def reset(self) -> None:
        """Nothing of what they know is true any more."""
        for request in list(self._leased.values()):
            self.drop(request)
        for request in self._live.values():
            request.all_asked()
            request.until.clear()
            request.patience = None

    def _unless_empty(self, request: Request) -> None:
        if not request.leased:
            self._leased.pop(request.req.request, None)


def unique(keys: Collection[OffloadKey]) -> list[OffloadKey]:
    """Each key once, in their order."""
    return list(dict.fromkeys(keys))
