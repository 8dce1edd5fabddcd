"""A watch over a connection of its own, which begins anew when that is cut: for stores whose servers come back.

Room `rendezvous`; may import the ground and its own room. What a store of somebody else has to say is how to connect
and what is told over the connection; when to try again, what to return meanwhile and how to end is the same for all.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from tensorway.errors import DeadlineExceeded
from tensorway.rendezvous.contract import Event

#: It is begun anew in attempts of this length, between which it can be closed, with a pause after each.
_ATTEMPT: Final = 1.0
_PAUSE: Final = 0.05

_Connection = TypeVar("_Connection")


class Reopening(ABC, Generic[_Connection]):
    """See `contract.Changes`. It begins anew when its connection is cut, with a `reset` if that may have missed any."""

    def __init__(self, prefix: str, forget: Callable[[Any], None]) -> None:
        self._prefix = prefix
        #: Told when it is closed.
        self._forget = forget
        self._connection: _Connection | None = None
        self._busy = threading.Lock()
        self._closed = False
        #: Whether something may have happened that neither the last connection nor the one before it tells.
        self.missed = True

    @abstractmethod
    def _open(self, seconds: float) -> _Connection:
        """Connect and watch: nothing that happens after this returns is missed. Raises `DeadlineExceeded`.

        A store that tells what happened before, too, from where the last connection was cut, sets `missed` to False.
        """

    @abstractmethod
    def _told(self, connection: _Connection, until: float) -> list[Event]:
        """What has arrived; may wait for the first of it until then. Calls `_cut` when the connection is no more."""

    @abstractmethod
    def _shut(self, connection: _Connection) -> None:
        """Close the connection."""

    def _wake(self, connection: _Connection) -> None:
        """Let a thread that is in `_told` return; needed unless that waits for less than a second at a time."""

    def begin(self, seconds: float) -> None:
        """Connect for the first time; called once, before anything else."""
        self._connection = self._open(seconds)

    def next(self, seconds: float) -> list[Event]:
        """What happened."""
        until = time.monotonic() + seconds
        with self._busy:
            while not self._closed:
                events: list[Event] = []
                if self._connection is not None:
                    events = self._told(self._connection, until)
                elif self._reopened(until) and self.missed:
                    break
                if events or time.monotonic() >= until:
                    return events
        return [Event("reset", self._prefix)]

    def close(self) -> None:
        """No more; who waits is woken."""
        self._closed = True
        connection = self._connection
        if connection is not None:
            self._wake(connection)
        with self._busy:
            self._cut()
        self._forget(self)

    def _cut(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._shut(connection)

    def _reopened(self, until: float) -> bool:
        try:
            self._connection = self._open(max(0.0, min(_ATTEMPT, until - time.monotonic())))
        except DeadlineExceeded:
            time.sleep(max(0.0, min(_PAUSE, until - time.monotonic())))
            return False
        return True
