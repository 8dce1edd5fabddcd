"""Whether a tier is used, tried, or left alone: a tier that fails or hangs costs little, and is used again by itself.

May import the standard library only. It opens on lateness as on errors, and while it is open the tier is probed again
and again: there is no state that only traffic could end, and none that only a restart could.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal

#: By how `offload_breaker` says it.
STATES: Final = ("closed", "trying", "open")
#: The last calls that are looked at, and how many of them may have failed.
_WINDOW: Final = 16
_HALF: Final = _WINDOW // 2


class Breaker:
    """Of one tier. Calls are begun with `begin` and ended with its answer, so that old news change nothing."""

    def __init__(self, failures: int, pause: float, longest: float) -> None:
        self._most, self._first, self._longest = failures, pause, longest
        self.state: Literal["closed", "trying", "open"] = "closed"
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._row = 0
        self._pause, self._retry_at = pause, 0.0
        self._turn = 0
        #: Calls that are under way while the tier is tried, and whether it is being probed while it is open.
        self._trials, self._probing = 0, False

    def allows(self) -> bool:
        """Whether a call may begin now; while the tier is tried, one at a time."""
        return self.state == "closed" or (self.state == "trying" and not self._trials)

    def begin(self) -> int:
        """A call begins; what `ended` is to be told."""
        self._trials += self.state == "trying"
        return self._turn

    def ended(self, turn: int, good: bool, now: float) -> None:
        """It has ended, or its time is up. What began before the state changed says nothing of it any more."""
        if turn != self._turn or self.state == "open":
            return
        if self.state == "trying":
            if good:
                self._enter("closed")
                self._pause = self._first
            else:
                self._open(now)
            return
        self._recent.append(good)
        self._row = 0 if good else self._row + 1
        if self._row >= self._most or self._recent.count(False) > _HALF:
            self._open(now)

    def withdrawn(self, turn: int) -> None:
        """It never began: nothing is known."""
        if turn == self._turn and self._trials:
            self._trials -= 1

    def due(self, now: float) -> bool:
        """Whether the tier is to be probed; then `probed` is to be called, whatever comes of it."""
        if self.state != "open" or self._probing or now < self._retry_at:
            return False
        self._probing = True
        return True

    def probed(self, usable: bool, now: float) -> None:
        """What a probe has said; not usable, if it raised or was late."""
        self._probing = False
        if self.state != "open":
            return
        if usable:
            self._enter("trying")
        else:
            self._wait(now)

    def _open(self, now: float) -> None:
        self._enter("open")
        self._wait(now)

    def _wait(self, now: float) -> None:
        self._retry_at = now + self._pause
        self._pause = min(2 * self._pause, self._longest)

    def _enter(self, state: Literal["closed", "trying", "open"]) -> None:
        self.state = state
        self._turn += 1
        self._trials = self._row = 0
        self._recent.clear()
