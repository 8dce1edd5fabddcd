"""Reading rows of a peer: straight to where blocks are wanted if that is registered, else by way of memory that is.

May import the core, and this package's meeting and lending.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Condition
from typing import Final

import attrs

from tensorway.errors import TensorwayError
from tensorway.memory import Region, shared
from tensorway.offload import TierContext
from tensorway.transport import BlockTable, Route, Transfer, Transport
from tensorway_offload.peer.lending import checksum
from tensorway_offload.peer.meeting import Neighbour

#: Seconds between two looks at whether a transfer that failed has let go.
_LOOK: Final = 0.002


@attrs.frozen
class Want:
    """A block that a peer has lent: where it goes, where it lies, and what its bytes must be."""

    #: What the caller calls it.
    place: int
    view: memoryview
    row: int
    sum: bytes


class Reader:
    """Over one transport. Threads share it."""

    def __init__(self, transport: Transport, context: TierContext, bounce_rows: int) -> None:
        self._transport = transport
        self._memory, self._row_bytes = context.memory, context.row_bytes
        self._stride = max(context.nbytes)
        self._bounce = shared(bounce_rows * self._stride)
        # The primary tier's rows first: that is where peers look for them.
        self._registrations = [transport.register(context.memory)] if context.memory is not None else []
        self._registrations.append(transport.register(self._bounce))
        self._region = Region.of(self._bounce)
        self._free = list(range(bounce_rows))
        self._freed = Condition()

    def read(self, neighbour: Neighbour, wants: Sequence[Want], until: float) -> list[bool]:
        """Which of these have come until then, with the right bytes. No view is written to after that."""
        good: set[int] = set()
        direct: dict[tuple[int, bool], list[tuple[Want, int]]] = {}
        other = []
        for want in wants:
            place = self._place(want.view)
            if place is None:
                other.append(want)
            else:
                direct.setdefault((want.view.nbytes, True), []).append((want, place))
        for (nbytes, _), some in direct.items():
            if self._moved(neighbour, nbytes, some, until, True):
                good.update(want.place for want, _ in some if checksum(want.view) == want.sum)
        while other and (slots := self._take(len(other), until)):
            same = [want for want in other if want.view.nbytes == other[0].view.nbytes][: len(slots)]
            other = [want for want in other if want not in same]
            self._by_way(neighbour, same, slots, until, good)
        return [want.place in good for want in wants]

    def close(self, deadline: float) -> None:
        """Deregister."""
        until = time.monotonic() + deadline
        for registration in self._registrations:
            registration.close(max(0.0, until - time.monotonic()))

    def _by_way(
        self, neighbour: Neighbour, wants: Sequence[Want], slots: list[int], until: float, good: set[int]
    ) -> None:
        used, spare = slots[: len(wants)], slots[len(wants) :]
        try:
            pairs = list(zip(wants, used, strict=True))
            if self._moved(neighbour, wants[0].view.nbytes, pairs, until, False):
                for want, slot in pairs:
                    start = slot * self._stride
                    found = self._bounce[start : start + want.view.nbytes]
                    if checksum(found) == want.sum:
                        want.view[:] = found
                        good.add(want.place)
        finally:
            self._give([*used, *spare])

    def _moved(
        self, neighbour: Neighbour, nbytes: int, pairs: Sequence[tuple[Want, int]], until: float, direct: bool
    ) -> bool:
        """Whether one read of all these was done in time. Returns when nothing is written any more, and not before."""
        seconds = until - time.monotonic()
        if seconds <= 0:
            return False
        transfer: Transfer | None = None
        try:
            route = self._route(neighbour, nbytes, direct)
            places, rows = [place for _, place in pairs], [want.row for want, _ in pairs]
            transfer = self._transport.read(route, places, rows, deadline=seconds)
            transfer.wait()
        except TensorwayError:
            # Its deadline passed, the peer is lost, or it said rows that it has not.
            while transfer is not None and not transfer.released:
                time.sleep(_LOOK)
            return False
        return True

    def _route(self, neighbour: Neighbour, nbytes: int, direct: bool) -> Route:
        route = neighbour.routes.get((nbytes, direct))
        if route is None:
            theirs = BlockTable.over(neighbour.peer.regions[0], nbytes, stride=neighbour.row_bytes)
            if direct and self._memory is not None:
                ours = BlockTable.over(self._memory, nbytes, stride=self._row_bytes)
            else:
                ours = BlockTable.over(self._region, nbytes, stride=self._stride)
            route = neighbour.routes[nbytes, direct] = self._transport.prepare(neighbour.peer, ours, theirs)
        return route

    def _place(self, view: memoryview) -> int | None:
        """Which row of the primary tier a view is the beginning of, if it is one."""
        if self._memory is None:
            return None
        offset = Region.of(view).address - self._memory.address
        if not 0 <= offset <= self._memory.nbytes - view.nbytes or offset % self._row_bytes:
            return None
        return offset // self._row_bytes

    def _take(self, most: int, until: float) -> list[int]:
        with self._freed:
            while not self._free:
                left = until - time.monotonic()
                if left <= 0 or not self._freed.wait(left):
                    return []
            taken, self._free = self._free[:most], self._free[most:]
            return taken

    def _give(self, slots: list[int]) -> None:
        with self._freed:
            self._free += slots
            self._freed.notify_all()
