"""The records of `direct`, in memory: revisions, leases, limits. No socket, no thread, no clock of its own.

Room `rendezvous`; may import the ground and its own room.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final, Literal

import attrs

from tensorway.errors import LeaseLost, RecordRefused
from tensorway.rendezvous.contract import Event, Record, check_key, check_ttl, check_value

#: What all clients together may keep here: endpoints and how to reach them, never data.
MAX_RECORDS: Final = 65_536
MAX_LEASES: Final = 65_536
MAX_BYTES: Final = 512 << 20

_Ending = Literal["deleted", "expired"]


@attrs.define
class _Lease:
    ttl: float
    ends: float
    keys: set[str]


class Records:
    """What a service holds; `changed` is called with each event, in order."""

    def __init__(self, changed: Callable[[Event], None]) -> None:
        self._changed = changed
        self._records: dict[str, Record] = {}
        self._leases: dict[str, _Lease] = {}
        #: Of the last change of all.
        self.revision = 0
        self._bytes = 0

    def put(self, key: str, value: bytes, lease: str, expected: int | None) -> int:
        """Write; see `contract.Store`."""
        check_value(check_key(key), value)
        old = self._records.get(key)
        self._compare(key, old, expected)
        if lease and lease not in self._leases:
            raise LeaseLost.ended(f"{key} was to be put under a lease.")
        grown = self._bytes + len(value) - (len(old.value) if old else 0)
        if (old is None and len(self._records) >= MAX_RECORDS) or grown > MAX_BYTES:
            raise RecordRefused(
                f"{key} was to be put.",
                f"The service holds {len(self._records):,} records of {self._bytes:,} bytes, as many as it takes.",
                "Give records a lease, so that those of dead processes go.",
            )
        self._unlease(old)
        self.revision += 1
        self._bytes = grown
        record = self._records[key] = Record(key, value, self.revision, lease)
        if lease:
            self._leases[lease].keys.add(key)
        self._changed(Event("put", key, record))
        return self.revision

    def get(self, key: str) -> Record | None:
        """Read."""
        return self._records.get(key)

    def list(self, prefix: str) -> list[Record]:
        """All below a prefix, by key."""
        return [self._records[key] for key in sorted(self._records) if key.startswith(prefix)]

    def delete(self, key: str, expected: int | None) -> bool:
        """Remove; whether it was there."""
        old = self._records.get(key)
        self._compare(key, old, expected)
        return self._remove(key, "deleted")

    def grant(self, ttl: float, now: float) -> str:
        """A new lease; nobody can guess its name."""
        check_ttl(ttl)
        if len(self._leases) >= MAX_LEASES:
            raise RecordRefused("A lease was asked for.", f"{MAX_LEASES:,} are held.", "Revoke those that have no use.")
        name = secrets.token_hex(16)
        self._leases[name] = _Lease(ttl, now + ttl, set())
        return name

    def keep(self, lease: str, now: float) -> bool:
        """Begin its time anew."""
        held = self._leases.get(lease)
        if held is None:
            return False
        held.ends = now + held.ttl
        return True

    def revoke(self, lease: str) -> None:
        """End it, because its holder says so."""
        self._end(lease, "deleted")

    @property
    def count(self) -> int:
        """Records."""
        return len(self._records)

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return self._bytes

    @property
    def leases(self) -> int:
        """Leases that are held."""
        return len(self._leases)

    def left(self, prefix: str, now: float) -> dict[str, float]:
        """The seconds that each lease lasts if nobody keeps it, of those with a record below a prefix."""
        named = {record.lease for key, record in self._records.items() if key.startswith(prefix) and record.lease}
        return {name: max(0.0, self._leases[name].ends - now) for name in sorted(named)}

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for name in [name for name, lease in self._leases.items() if lease.ends <= now]:
            self._end(name, "expired")

    def _end(self, lease: str, kind: _Ending) -> None:
        held = self._leases.pop(lease, None)
        for key in sorted(held.keys) if held else ():
            self._remove(key, kind)

    def _remove(self, key: str, kind: _Ending) -> bool:
        old = self._records.pop(key, None)
        if old is None:
            return False
        self._unlease(old)
        self._bytes -= len(old.value)
        self.revision += 1
        self._changed(Event(kind, key))
        return True

    def _unlease(self, record: Record | None) -> None:
        if record is not None and record.lease in self._leases:
            self._leases[record.lease].keys.discard(record.key)

    def _compare(self, key: str, old: Record | None, expected: int | None) -> None:
        revision = old.revision if old else 0
        if expected is not None and expected != revision:
            raise RecordRefused.changed(key, expected, revision)
