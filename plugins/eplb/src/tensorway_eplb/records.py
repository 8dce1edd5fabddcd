"""What a member puts into the rendezvous for as long as it lives. May import the core."""

from __future__ import annotations

from typing import Final

from tensorway.errors import LeaseLost
from tensorway.rendezvous import Lease, Rendezvous

#: Seconds that the records of a member outlive it.
_TTL: Final = 10.0


class OwnRecords:
    """Records under one lease; without a lease where the rendezvous has none, and then they stay."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._able = "lease" in rendezvous.abilities
        self._lease: Lease | None = None

    def put(self, key: str, value: bytes, deadline: float, expected: int | None = None) -> None:
        """Write one; see `Rendezvous.put`."""
        if self._able and (self._lease is None or self._lease.lost):
            self._lease = self._rendezvous.lease(_TTL, deadline)
        try:
            self._rendezvous.put(key, value, lease=self._lease, expected=expected, deadline=deadline)
        except LeaseLost:  # this process was stopped for longer than it lives, or the service was started anew
            self._lease = self._rendezvous.lease(_TTL, deadline)
            self._rendezvous.put(key, value, lease=self._lease, expected=expected, deadline=deadline)

    def close(self) -> None:
        """Take all of them back."""
        if self._lease is not None and not self._lease.lost:
            self._rendezvous.end(self._lease)
        self._lease = None
