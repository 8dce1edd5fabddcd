"""How much may wait to be written to a tier: bounded in blocks, in bytes, in seconds and by a rate.

May import this package's limits. Only stores are ever dropped. Errors and lateness count as much as slowness does: a
tier that fails fast would else look as if it were the fastest of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tensorway_offload.limits import TierLimits

#: How much of what was known of a tier's speed is left after each call that says more.
_KEPT: Final = 0.8
#: Seconds without a store after a call that failed: twice as long after each one more, up to the longest.
_REST: Final = (0.05, 5.0)


class Pressure:
    """What waits for one tier, and how fast the tier has been."""

    def __init__(self, limits: TierLimits) -> None:
        self._limits = limits
        self.blocks = self.nbytes = 0
        #: Bytes that were written, and seconds that it took; both are forgotten in the same measure.
        self._written = self._seconds = 0.0
        self._rest, self._resting_until, self._why = _REST[0], 0.0, "pressure"
        #: Bytes that the rate allows at once, and since when it was not looked at.
        self._allowed, self._since = limits.store_rate, 0.0

    def admit(self, sizes: Sequence[int], now: float) -> tuple[int, str]:
        """How many of these blocks, from the first on, are taken, and why the others are not. Counts those taken."""
        taken = 0
        if now < self._resting_until:
            return 0, self._why
        if self._limits.store_rate:
            # A second's worth, or one block if that is more: or a large one would never be taken.
            most = max(self._limits.store_rate, *sizes) if sizes else self._limits.store_rate
            self._allowed = min(most, self._allowed + (now - self._since) * self._limits.store_rate)
            self._since = now
        for size in sizes:
            if not self._fits(size):
                break
            self.blocks, self.nbytes = self.blocks + 1, self.nbytes + size
            self._allowed -= size
            taken += 1
        return taken, "pressure"

    def left(self, blocks: int, nbytes: int) -> None:
        """So many wait no more."""
        self.blocks, self.nbytes = self.blocks - blocks, self.nbytes - nbytes

    def wrote(self, nbytes: int, seconds: float, trouble: str, now: float) -> None:
        """A call has ended, with so many bytes stored; `trouble` is `full`, or why nothing was."""
        self._written = _KEPT * self._written + nbytes
        self._seconds = _KEPT * self._seconds + max(seconds, 0.0)
        if not trouble:
            self._rest = _REST[0]
            return
        self._resting_until, self._why = now + self._rest, "full" if trouble == "full" else "pressure"
        self._rest = min(2 * self._rest, _REST[1])

    def _fits(self, size: int) -> bool:
        limits = self._limits
        if limits.store_rate and self._allowed < size:
            return False
        if not self.blocks:  # one is always tried, or nothing would ever be known anew
            return True
        if self.blocks >= limits.queue_blocks or self.nbytes + size > limits.queue_bytes:
            return False
        expected = (self.nbytes + size) * self._seconds / self._written if self._written else 0.0
        return expected <= limits.patience
