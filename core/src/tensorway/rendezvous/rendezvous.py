"""A rendezvous made of a store: leases that keep themselves, waits, watches, seals; written once for all stores.

Room `rendezvous`; may import the ground and its own room. Every call has a deadline. Threads may share one; a process
that was forked may not use its parent's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from typing import Final

import attrs

from tensorway import settings
from tensorway._logging import logger, warn_once
from tensorway.errors import Closed, DeadlineExceeded, LeaseLost, TensorwayError, Unsupported
from tensorway.rendezvous.contract import Ability, Changes, Event, Record, Store, check_key, check_ttl, check_value
from tensorway.rendezvous.leases import Lease, keeper

_log = logger("rendezvous")
_SEAL_BYTES: Final = 32
#: How often a store without watches is asked again: from the first to the second, in seconds.
_ASK_AGAIN: Final = (5e-3, 0.2)


class Watch:
    """Changes below a prefix from now on; see `contract.Event`."""

    def __init__(self, changes: Changes, rendezvous: Rendezvous) -> None:
        self._changes = changes
        self._rendezvous = rendezvous

    def next(self, deadline: float) -> list[Event]:
        """What happened; waits for the first of it, and is empty when nothing did in time."""
        until = time.monotonic() + deadline
        while True:
            self._rendezvous._check()
            events = self._changes.next(until - time.monotonic())
            opened = [event for event in map(self._rendezvous._opened_event, events) if event is not None]
            if opened or time.monotonic() >= until:
                return opened

    def close(self) -> None:
        """No more."""
        self._changes.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Rendezvous:
    """Records that all members of a deployment see. Keys are like paths: `/deployment/group/member`."""

    def __init__(self, store: Store, secret: str = "") -> None:
        self._store = store
        # The secret itself may be the password of more than this.
        self._seal = b"" if store.authenticates else hashlib.blake2b(secret.encode(), person=b"tensorway seal").digest()
        self._pid = os.getpid()
        self._closed = False
        self._closing = threading.Lock()

    @property
    def name(self) -> str:
        """The store's name."""
        return self._store.name

    @property
    def address(self) -> str:
        """Where others reach the same store, if it has one address."""
        return str(getattr(self._store, "address", ""))

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the store can do beyond put, get, list and delete."""
        return self._store.abilities

    # -- records

    def put(
        self, key: str, value: bytes, *, lease: Lease | None = None, expected: int | None = None, deadline: float = 5.0
    ) -> int:
        """Write a record; returns its revision.

        With a lease it ends with the lease. With `expected` it is written only if the key is at that revision now (0
        for a key that is not there), and `RecordRefused` is raised otherwise.
        """
        self._check()
        check_value(check_key(key), value)
        if expected is not None:
            self._need("compare")
        if lease is not None and lease.lost:
            raise LeaseLost.ended(f"{key} was to be put under a lease.")
        return self._store.put(key, self._sealed(key, value), lease.name if lease else "", expected, deadline)

    def get(self, key: str, deadline: float = 5.0) -> Record | None:
        """Read a record."""
        self._check()
        record = self._store.get(check_key(key), deadline)
        return self._opened(record) if record else None

    def list(self, prefix: str, deadline: float = 5.0) -> list[Record]:
        """All records below a prefix, by key."""
        self._check()
        records = self._store.list(check_key(prefix, "prefix"), deadline)
        return [record for record in map(self._opened, records) if record is not None]

    def delete(self, key: str, *, expected: int | None = None, deadline: float = 5.0) -> bool:
        """Remove a record; whether it was there."""
        self._check()
        if expected is not None:
            self._need("compare")
        return self._store.delete(check_key(key), expected, deadline)

    def wait(self, key: str, deadline: float) -> Record:
        """The record, as soon as somebody has put it; raises `DeadlineExceeded` if nobody does."""
        self._check()
        until = time.monotonic() + deadline
        changes = self._store.changes(check_key(key), deadline) if "watch" in self.abilities else None
        pause, answered = _ASK_AGAIN[0], False
        try:
            while (left := until - time.monotonic()) > 0:
                try:
                    if (record := self.get(key, left)) is not None:
                        return record
                except DeadlineExceeded:
                    if not answered:
                        raise  # else what was waited for says more than a try that time cut short
                    break
                answered = True
                if changes is not None:
                    changes.next(until - time.monotonic())
                else:
                    time.sleep(max(0.0, min(pause, until - time.monotonic())))
                    pause = min(2 * pause, _ASK_AGAIN[1])
        finally:
            if changes is not None:
                changes.close()
        raise DeadlineExceeded(
            f"{key} was waited for in the rendezvous {self.name}.",
            f"Nobody put it within {deadline:g} s.",
            "See whether the member that puts it has started, and in the same deployment.",
        )

    def watch(self, prefix: str, deadline: float = 5.0) -> Watch:
        """What changes below a prefix from now on."""
        self._check()
        self._need("watch")
        return Watch(self._store.changes(check_key(prefix, "prefix"), deadline), self)

    # -- leases

    def lease(self, ttl: float = 10.0, deadline: float = 5.0) -> Lease:
        """A lease, kept by a thread until `end`; when this process dies it ends within `ttl` seconds."""
        self._check()
        self._need("lease")
        check_ttl(ttl)
        began = time.monotonic()  # the store's clock starts later, so ours is never the last to say that it ended
        lease = Lease(self._store.grant(ttl, deadline), ttl, began)
        keeper().hold(lease, self._store)
        return lease

    def end(self, lease: Lease, deadline: float = 5.0) -> None:
        """End a lease, and its records with it."""
        self._check()
        if keeper().let_go(lease, "its holder ended it"):
            self._store.revoke(lease.name, deadline)

    # -- seals

    def _sealed(self, key: str, value: bytes) -> bytes:
        return self._tag(key, value) + value if self._seal else value

    def _opened(self, record: Record) -> Record | None:
        """The record without its seal; None if nobody who knows the secret wrote it under this key."""
        if not self._seal:
            return record
        tag, value = record.value[:_SEAL_BYTES], record.value[_SEAL_BYTES:]
        if hmac.compare_digest(tag, self._tag(record.key, value)):
            return attrs.evolve(record, value=value)
        message = (
            "A record in the rendezvous %s was not written with our secret; it and its like are passed over: %.200r"
        )
        warn_once(_log, ("seal", self.name), message, self.name, record.key, rank=settings.local_rank(), extra={})
        return None

    def _opened_event(self, event: Event) -> Event | None:
        if event.record is None:
            return event
        record = self._opened(event.record)
        return attrs.evolve(event, record=record) if record else None

    def _tag(self, key: str, value: bytes) -> bytes:
        message = len(key).to_bytes(2, "big") + key.encode() + value
        return hashlib.blake2b(message, key=self._seal, digest_size=_SEAL_BYTES).digest()

    # -- ends

    def close(self, deadline: float = 2.0) -> None:
        """End every lease and let go of the store; the second call does nothing."""
        with self._closing:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        until = time.monotonic() + deadline
        try:
            for lease in keeper().let_all_go(self._store, "its holder closed the rendezvous"):
                self._store.revoke(lease.name, max(0.0, until - time.monotonic()))
        except TensorwayError as error:
            _log.debug("A lease ends by itself: %s", error)
        finally:
            self._store.close()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed or os.getpid() != self._pid:
            true = "It is closed." if self._closed else "It belongs to the process that this one was forked from."
            raise Closed(f"The rendezvous {self.name} was used.", true, "Enter it again, in this process.")

    def _need(self, ability: Ability) -> None:
        if ability not in self.abilities:
            raise Unsupported(
                f"The rendezvous {self.name} was asked for: {ability}.",
                f"Its store can: {', '.join(sorted(self.abilities)) or 'put, get, list and delete only'}.",
                "Choose a store that can: tensorway plugins list --kind rendezvous",
            )
