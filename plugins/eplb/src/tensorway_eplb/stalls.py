"""Counts the time in which a rebalance stands still: nothing comes, nothing is decided, nothing is taken over.

May import the core's logging. It is told what was done so far, again and again, and measures how long that stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Final

from tensorway._logging import logger

_log = logger("eplb")
#: When nothing has happened for so long, it is a stall.
STALL: Final = 1.0


class Stalls:
    """Of one rebalance."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._done: Hashable = None
        self._stalled = False
        #: Until when time is counted, or need not be.
        self._until = time.monotonic()

    def look(self, done: Hashable, waits_for: Callable[[], str]) -> None:
        """`done` is all that was done so far; `waits_for` says for the log what is missing."""
        now = time.monotonic()
        if done != self._done:
            self._done, self._until, self._stalled = done, now, False
        elif self._stalled or now - self._until > STALL:
            self.seconds += now - self._until
            if not self._stalled:
                self.count += 1
                _log.warning("A rebalance has stood still for %.1f s: %s", STALL, waits_for())
            self._until, self._stalled = now, True
