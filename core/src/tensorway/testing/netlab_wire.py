"""A wire that takes its time: frames between two interfaces, each held for a while before it goes on.

Room `testing`; the standard library only. `python -m tensorway.testing.netlab_wire LEFT RIGHT SECONDS JITTER REORDER`
carries until its input ends. Packet sockets with the kernel's own headers for unfinished checksums and long frames are
enough for that: no device and no privilege but that over the network, which a user namespace has, too.
"""

from __future__ import annotations

import heapq
import itertools
import random
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Final

#: Numbers of the kernel that Python has no names for.
_SOL_PACKET: Final = 263
_PACKET_VNET_HDR: Final = 15
_PACKET_IGNORE_OUTGOING: Final = 23
_ETH_P_ALL: Final = 3
_SO_RCVBUFFORCE: Final = 33
#: Bytes that a socket keeps while this is busy, and that may be on their way; what is more is lost, as in a switch.
_KEPT: Final = 16 << 20
_FRAME: Final = 1 << 17
#: Frames taken from one end before the other one is asked.
_BURST: Final = 64


def end(interface: str) -> socket.socket:
    """A socket that hears whatever arrives at an interface, and sends through it."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        opened.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KEPT)
        except PermissionError:  # in a user namespace: then as much as the system allows everybody
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KEPT)
        opened.bind((interface, _ETH_P_ALL))
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


class Wire:
    """Two ends, and what is on its way between them."""

    def __init__(self, ends: Sequence[socket.socket], seconds: float, jitter: float, reorder: float) -> None:
        self._ends = ends
        self._seconds, self._jitter, self._reorder = seconds, jitter, reorder / 100
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._count = itertools.count()
        self._kept = 0
        #: For each direction, when the last frame is due: jitter alone changes no order.
        self._last = [0.0, 0.0]

    def carry(self, until: int) -> None:
        """Carry frames until this descriptor can be read."""
        while True:
            left = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            heard: list[int | socket.socket] = [until, *self._ends]
            ready = select.select(heard, [], [], left)[0]
            if until in ready:
                return
            for side, opened in enumerate(self._ends):
                if opened in ready:
                    self._take(side)
            self._deliver()

    def _take(self, side: int) -> None:
        for _ in range(_BURST):
            try:
                frame = self._ends[side].recv(_FRAME)
            except OSError:  # nothing more for now, or the interface is down: then the frame is lost, as on a wire
                return
            if self._kept + len(frame) <= _KEPT:
                self._kept += len(frame)
                heapq.heappush(self._waiting, (self._due(side), next(self._count), 1 - side, frame))

    def _due(self, side: int) -> float:
        now = time.monotonic()
        if random.random() < self._reorder:
            return now
        self._last[side] = max(self._last[side], now + self._seconds + random.uniform(-self._jitter, self._jitter))
        return self._last[side]

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, side, frame = heapq.heappop(self._waiting)
            self._kept -= len(frame)
            try:
                self._ends[side].send(frame)
            except OSError:  # its queue is full, or it is down: the frame is lost, as on a wire
                continue


def main() -> None:
    """Carry between two interfaces until the input ends."""
    left, right, *numbers = sys.argv[1:]
    wire = Wire([end(left), end(right)], *map(float, numbers))
    print("on", flush=True)  # noqa: T201  it is what the lab waits for
    wire.carry(sys.stdin.fileno())


if __name__ == "__main__":
    main()
