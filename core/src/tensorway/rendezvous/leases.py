"""Leases, and the threads that keep those of this process: one for a client or a few, and never more than some.

Room `rendezvous`; may import the ground and its own room. To keep a lease is a call that waits for its store: one that
hangs holds up the other leases of its own client, and those of nobody else as long as there are threads left.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from typing import Final

from tensorway._logging import logger, warn_once
from tensorway.errors import TensorwayError
from tensorway.exports import export
from tensorway.metrics import Counters, Metric, Sample, vocabulary
from tensorway.rendezvous.contract import Store

#: `store` is the rendezvous' name.
METRICS: Final = vocabulary(
    Metric("rendezvous_held_leases", "gauge", ("store",), "Leases that this process keeps."),
    Metric("rendezvous_lease_seconds", "gauge", ("store",), "What is left of the one of them that ends first."),
    Metric("rendezvous_lost_leases_total", "counter", ("store",), "Leases that were lost."),
)

_log = logger("rendezvous")
#: A lease is kept this many times within its life, so that two may fail.
_KEPT_TIMES: Final = 3
#: And each time a little earlier than it must be, by up to this part: those who began together do not go on together.
_EARLIER: Final = 0.1
_MOST_THREADS: Final = 8


class Lease:
    """A promise to be alive. It is kept by a thread until `close`; `lost` says why it is not any more."""

    def __init__(self, name: str, ttl: float, kept: float) -> None:
        self.name = name
        self.ttl = ttl
        #: Why it is lost; empty while it is held.
        self.lost = ""
        self._kept = kept
        # At first at any time: a thousand leases may have begun at once, after a restart of the store.
        self._due = kept + random.random() * ttl / _KEPT_TIMES

    def __repr__(self) -> str:
        return f"Lease({self.name[:12]}, {self.ttl:g} s, {self.lost or 'held'})"


class Keeper:
    """Keeps leases: those of one store one after the other. Threads may share it."""

    def __init__(self) -> None:
        self._leases: dict[Lease, Store] = {}
        #: Stores that are being asked.
        self._busy: set[Store] = set()
        self._threads = 0
        self._changed = threading.Condition()
        self._counts = Counters(METRICS)
        export("leases", self.samples, METRICS)

    def samples(self) -> list[Sample]:
        """What is held now, as values of `METRICS`."""
        with self._changed:
            held, now = list(self._leases.items()), time.monotonic()
        found = Counters(METRICS)
        left = sorted(((lease._kept + lease.ttl - now, store.name) for lease, store in held), reverse=True)
        for seconds, name in left:  # the one that ends first is the last of its store
            found.add("rendezvous_held_leases", store=name)
            found.set("rendezvous_lease_seconds", round(seconds, 3), store=name)
        return [*found.samples(), *self._counts.samples()]

    def hold(self, lease: Lease, store: Store) -> None:
        """Keep it from now on."""
        with self._changed:
            if self._threads < self._wanted(store):
                threading.Thread(target=self._keep_all, name="tensorway-leases", daemon=True).start()
                self._threads += 1  # only now: a system may have no thread more
            self._leases[lease] = store
            self._changed.notify()

    def let_go(self, lease: Lease, why: str) -> bool:
        """Keep it no longer; whether it was held."""
        with self._changed:
            if self._leases.pop(lease, None) is None:
                return False
            lease.lost = why
            self._changed.notify_all()
            return True

    def let_all_go(self, store: Store, why: str) -> list[Lease]:
        """Those of a store; which were held."""
        with self._changed:
            leases = [lease for lease, its in self._leases.items() if its is store]
        return [lease for lease in leases if self.let_go(lease, why)]

    def _wanted(self, *more: Store) -> int:
        return min(_MOST_THREADS, len({*self._leases.values(), *more}))

    def _keep_all(self) -> None:
        while (found := self._next()) is not None:
            lease, store = found
            try:
                self._keep(lease, store)
            finally:
                with self._changed:
                    self._busy.discard(store)

    def _next(self) -> tuple[Lease, Store] | None:
        """A lease whose time has come, which is waited for; None when this thread is one too many."""
        with self._changed:
            while self._threads <= self._wanted():
                idle = (lease for lease, store in self._leases.items() if store not in self._busy)
                lease = min(idle, key=lambda lease: lease._due, default=None)
                wait = lease._due - time.monotonic() if lease else None
                if lease is not None and wait is not None and wait <= 0:
                    self._busy.add(self._leases[lease])
                    return lease, self._leases[lease]
                self._changed.wait(wait)
            self._threads -= 1
            return None

    def _keep(self, lease: Lease, store: Store) -> None:
        """Keep one lease, once. Which is lost when its time is over by our clock: the store may have ended it."""
        started, step = time.monotonic(), lease.ttl / _KEPT_TIMES
        lost = f"it was not kept for {lease.ttl:g} s"
        try:
            kept = store.keep(lease.name, step)
            lost = lost if kept else "the store does not know it any more"
        except Exception as error:  # also a defect of the store's: it costs a try, and not the thread of all leases
            _log.debug("A lease was not kept: %s", error)
            if not isinstance(error, TensorwayError):
                said = "The store %s of a rendezvous has a defect, and a lease was not kept: %r"
                warn_once(_log, ("lease", store.name), said, store.name, error, rank=0, extra={"store": store.name})
            kept, step = False, min(step, 0.5)
            lost = lost if started - lease._kept > lease.ttl else ""
        with self._changed:
            lease._due = time.monotonic() + step * random.uniform(1 - _EARLIER, 1)
            if kept:
                lease._kept = started
        if not kept and lost and self.let_go(lease, lost):
            with self._changed:
                self._counts.add("rendezvous_lost_leases_total", store=store.name)
            _log.warning("A lease of the rendezvous %s is lost: %s.", store.name, lost)


def keeper() -> Keeper:
    """The keeper of this process: one that was forked begins with none of its parent's leases."""
    return _keeper_of(os.getpid())


@functools.cache
def _keeper_of(_process: int) -> Keeper:
    return Keeper()
