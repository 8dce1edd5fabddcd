"""The store `ray`: a client of `direct`, which finds its service again when that has moved.

May import tensorway's ground, the rendezvous and its own package. A service that died with its actor or its node is a
restart: leases and records are gone, watches are told `reset`, members put themselves again. The first client that
misses it starts the next one; all others find that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

from tensorway.errors import Closed, DeadlineExceeded, Unauthenticated
from tensorway.rendezvous.contract import Ability, Changes, Event, Record
from tensorway.rendezvous.direct import DirectStore
from tensorway.rendezvous.reopening import Reopening
from tensorway_ray import keeper
from tensorway_ray.options import RayOptions

#: After so many seconds without an answer Ray is asked whether the actor lives, and how long it may take to say.
_PATIENCE: Final = 1.0
_ASKING: Final = 2.0
#: How often a watch in which nothing happens looks whether its service is there.
_LOOK: Final = 2.0

_Result = TypeVar("_Result")
#: A client of the service, and a watch of it.
Opened: TypeAlias = tuple[DirectStore, Changes]


class RayStore:
    """See `contract.Store`. Threads may share it."""

    name = "ray"
    abilities: frozenset[Ability] = frozenset({"lease", "watch", "compare"})
    authenticates = True

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._actor, entrance = keeper.find(options, options.deadline)
        #: Where the service is now.
        self.address = entrance.address
        self._direct = DirectStore(entrance.address, entrance.secret)
        self._heard = time.monotonic()

    def put(self, key: str, value: bytes, lease: str, expected: int | None, seconds: float) -> int:
        """Write."""
        return self._once(expected, seconds, lambda direct, left: direct.put(key, value, lease, expected, left))

    def get(self, key: str, seconds: float) -> Record | None:
        """Read."""
        return self._call(seconds, lambda direct, left: direct.get(key, left))

    def list(self, prefix: str, seconds: float) -> list[Record]:
        """All below a prefix."""
        return self._call(seconds, lambda direct, left: direct.list(prefix, left))

    def delete(self, key: str, expected: int | None, seconds: float) -> bool:
        """Remove."""
        return self._once(expected, seconds, lambda direct, left: direct.delete(key, expected, left))

    def grant(self, ttl: float, seconds: float) -> str:
        """A new lease."""
        return self._call(seconds, lambda direct, left: direct.grant(ttl, left))

    def keep(self, lease: str, seconds: float) -> bool:
        """Begin its time anew; a service that was started again does not know it."""
        return self._call(seconds, lambda direct, left: direct.keep(lease, left))

    def revoke(self, lease: str, seconds: float) -> None:
        """End it."""
        self._call(seconds, lambda direct, left: direct.revoke(lease, left))

    def changes(self, prefix: str, seconds: float) -> RayChanges:
        """Watch a prefix."""
        changes = RayChanges(self, prefix)
        changes.begin(seconds)
        return changes

    def close(self) -> None:
        """Disconnect; the actor stays."""
        # Without the lock: who looks for the service that is there now holds it for as long as that takes.
        self._closed.set()
        self._direct.close()

    # -- a service that moves

    def present(self, seconds: float) -> DirectStore:
        """The client of the service that is there now."""
        return self._call(seconds, self._asked)

    def opened(self, prefix: str, seconds: float) -> Opened:
        """A watch of that client, and the client."""
        return self._call(seconds, lambda direct, left: (direct, direct.changes(prefix, left)))

    def _once(self, expected: int | None, seconds: float, use: Callable[[DirectStore, float], _Result]) -> _Result:
        """What compares is sent once, so it is sent to a service that has just answered."""
        if expected is None:
            return self._call(seconds, use)
        until = time.monotonic() + seconds
        fresh = time.monotonic() - self._heard < _PATIENCE
        direct = self._direct if fresh else self.present(seconds)
        return use(direct, max(0.0, until - time.monotonic()))

    def _call(self, seconds: float, use: Callable[[DirectStore, float], _Result]) -> _Result:
        until, patience = time.monotonic() + seconds, _PATIENCE
        while True:
            direct, left = self._direct, until - time.monotonic()
            try:
                result = use(direct, max(0.0, min(left, patience)))
            except (DeadlineExceeded, Closed, Unauthenticated) as error:
                left = until - time.monotonic()
                if self._closed.is_set() or (left <= 0 and not isinstance(error, DeadlineExceeded)):
                    raise
                if left <= 0:
                    true = f"No answer came within {seconds:g} s; it may have been done all the same."
                    raise DeadlineExceeded(
                        error.asked, true, "See whether Ray's head and its nodes live: ray status"
                    ) from error
                self._renew(direct, left)
                patience *= 2  # a value may be so large, or a line so slow, that it needs longer
            else:
                self._heard = time.monotonic()
                return result

    def _asked(self, direct: DirectStore, seconds: float) -> DirectStore:
        direct.get("/", seconds)
        return direct

    def _renew(self, direct: DirectStore, seconds: float) -> None:
        """Look for the service that is there now, unless another thread has, or the old one lives."""
        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            return
        try:
            if self._closed.is_set() or self._direct is not direct:
                return
            if keeper.alive(self._actor, min(_ASKING, seconds)):
                return
            actor, entrance = keeper.find(self._options, max(0.0, until - time.monotonic()))
            self._actor, self.address = actor, entrance.address
            self._direct = found = DirectStore(entrance.address, entrance.secret)
        finally:
            self._lock.release()
        direct.close()
        if self._closed.is_set():  # meanwhile, and perhaps before there was this one
            found.close()


class RayChanges(Reopening[Opened]):
    """See `contract.Changes`. It begins anew, with a `reset`, when the service has moved."""

    def __init__(self, store: RayStore, prefix: str) -> None:
        super().__init__(prefix, lambda _: None)
        self._store = store

    def _open(self, seconds: float) -> Opened:
        return self._store.opened(self._prefix, seconds)

    def _told(self, connection: Opened, until: float) -> list[Event]:
        direct, changes = connection
        events = changes.next(max(0.0, min(_LOOK, until - time.monotonic())))
        left = until - time.monotonic()
        if not events and left > 0 and not self._closed:
            with contextlib.suppress(DeadlineExceeded):  # it is looked for again
                if self._store.present(min(left, _LOOK)) is not direct:
                    self._cut()
        return events

    def _wake(self, connection: Opened) -> None:
        connection[1].close()

    _shut = _wake
