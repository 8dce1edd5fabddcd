"""The other actors that this one reads from, and when a connection to one is made anew.

May import tensorway's ground and `transport`. A connection knows the memory that was registered when its description
was made. One that was made from a later description knows an earlier object's memory, too, as long as that object is.
A transport that can reads on over the same wire. What nobody has used for a while, or what is lost, is let go.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

import attrs

from tensorway.errors import DeadlineExceeded
from tensorway.transport import Peer, Transport, description

#: Idle connections that are kept, one for each actor, and for how many seconds.
_KEPT: Final = 64
_IDLE: Final = 60.0
#: How often a thread looks for those that are to go, as long as there are any.
_LOOK: Final = 2.0


@attrs.define(eq=False)
class _Source:
    peer: Peer
    #: Which description of its actor it was made from.
    number: int
    users: int = 0
    #: When it was used last.
    used: float = attrs.field(factory=time.monotonic)


class Sources:
    """Threads may share it."""

    def __init__(self, idle: float = _IDLE) -> None:
        self._lock = threading.Lock()
        self._idle = idle
        self._tidying = False
        self._connecting: dict[str, threading.Lock] = {}
        #: By incarnation, the latest last.
        self._latest: dict[str, _Source] = {}

    @contextlib.contextmanager
    def using(self, endpoint: Transport, described: bytes, number: int, seconds: float) -> Iterator[Peer]:
        """The actor that gave this description; it stays connected as long as this is entered."""
        incarnation = description.decode(described, endpoint.name).incarnation
        source = self._entered(endpoint, described, number, seconds, incarnation)
        try:
            yield source.peer
        finally:
            with self._lock:
                source.users -= 1
                source.used = time.monotonic()
            self._let_go(endpoint, source)

    def doubt(self, peer: Peer) -> None:
        """Something with it did not end well: whoever comes next connects anew."""
        with self._lock:
            known = self._latest.get(peer.incarnation)
            if known is not None and known.peer is peer:
                del self._latest[peer.incarnation]

    def _entered(self, endpoint: Transport, described: bytes, number: int, seconds: float, incarnation: str) -> _Source:
        with self._lock:
            connecting = self._connecting.setdefault(incarnation, threading.Lock())
        # One at a time for each actor: whoever waited finds what the one before has made.
        until = time.monotonic() + seconds
        if not connecting.acquire(timeout=seconds):
            raise DeadlineExceeded(
                f"The actor of the endpoint {incarnation[:12]} was to be connected to.",
                f"Another thread has been connecting to it for {seconds:g} s.",
                "See whether its process runs, and whether this host reaches it.",
            )
        try:
            with self._lock:
                known = self._latest.get(incarnation)
                if known is not None and known.number >= number and not known.peer.lost:
                    known.users += 1
                    return known
            source = _Source(endpoint.connect(described, max(0.0, until - time.monotonic())), number, users=1)
            with self._lock:
                self._latest.pop(incarnation, None)
                self._latest[incarnation] = source
                idle = [row for row in self._latest.values() if not row.users][: max(0, len(self._latest) - _KEPT)]
                for row in idle:
                    del self._latest[row.peer.incarnation]
                    self._connecting.pop(row.peer.incarnation, None)
                if not self._tidying:
                    self._tidying = True
                    arguments = (endpoint,)
                    threading.Thread(
                        target=self._tidy, args=arguments, name="tensorway-ray-sources", daemon=True
                    ).start()
        finally:
            connecting.release()
        for row in [*idle, *([known] if known is not None else [])]:
            self._let_go(endpoint, row)
        return source

    def _let_go(self, endpoint: Transport, source: _Source) -> None:
        with self._lock:
            if source.users or self._latest.get(source.peer.incarnation) is source:
                return
        endpoint.disconnect(source.peer)

    def _tidy(self, endpoint: Transport) -> None:
        """A thread's: end what is idle or lost, until there is nothing left."""
        while True:
            time.sleep(min(_LOOK, self._idle))
            with self._lock:
                before = time.monotonic() - self._idle
                rows = [row for row in self._latest.values() if not row.users]
                rows = [row for row in rows if row.peer.lost or row.used <= before]
                for row in rows:
                    del self._latest[row.peer.incarnation]
                    self._connecting.pop(row.peer.incarnation, None)
                self._tidying = bool(self._latest)
                over = not self._tidying
            for row in rows:
                endpoint.disconnect(row.peer)
            if over:
                return
