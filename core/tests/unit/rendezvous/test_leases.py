"""What a keeper says of the leases that it holds."""

from __future__ import annotations

import threading
import time

import pytest

from tensorway.metrics import total
from tensorway.rendezvous.leases import Keeper, Lease
from tensorway.testing.waiting import eventually


class Store:
    """Keeps leases until it is told to forget them."""

    name = "scripted"
    knows = True

    def keep(self, name, deadline):
        return self.knows


def test_leases_that_are_held_that_end_soonest_and_that_were_lost():
    keeper, store = Keeper(), Store()
    assert [] == keeper.samples()
    short, long = (Lease(name, ttl, time.monotonic()) for name, ttl in (("a", 0.3), ("b", 60.0)))
    for lease, its in ((short, store), (long, Store())):
        keeper.hold(lease, its)
    samples = keeper.samples()
    assert 2 == total(samples, "rendezvous_held_leases", store="scripted")
    assert 0 < total(samples, "rendezvous_lease_seconds", store="scripted") <= 0.3
    assert 0 == total(samples, "rendezvous_lost_leases_total")
    store.knows = False
    eventually(lambda: short.lost)
    eventually(lambda: total(keeper.samples(), "rendezvous_lost_leases_total", store="scripted"))
    samples = keeper.samples()
    assert 1 == total(samples, "rendezvous_lost_leases_total", store="scripted")
    assert not long.lost
    assert keeper.let_go(long, "the test is over") and 0 == total(keeper.samples(), "rendezvous_held_leases")
    assert 1 == total(keeper.samples(), "rendezvous_lost_leases_total"), "who lets go has lost nothing"


def test_a_defect_of_a_store_costs_a_try_and_not_the_leases_of_others(caplog):
    class Broken(Store):
        name = "broken"

        def keep(self, name, deadline):
            kept.append(name)
            raise ZeroDivisionError("a store's own")

    keeper, kept = Keeper(), []
    first, other = (Lease(name, 1.2, time.monotonic()) for name in ("a", "b"))
    keeper.hold(first, Broken())
    eventually(lambda: len(kept) >= 2)
    keeper.hold(other, Store())
    eventually(lambda: first.lost)
    assert "it was not kept for 1.2 s" == first.lost and not other.lost
    assert 1 == sum("ZeroDivisionError" in record.getMessage() for record in caplog.records)
    kept_at = other._kept
    eventually(lambda: other._kept > kept_at)
    assert not other.lost
    eventually(lambda: 1 == keeper._threads)
    keeper.let_go(other, "the test is over")
    eventually(lambda: not keeper._threads)


def test_a_thread_that_cannot_begin_is_not_counted_and_its_lease_not_held(monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    keeper, lease = Keeper(), Lease("a", 60.0, time.monotonic())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError):
            keeper.hold(lease, Store())
    assert (0, {}) == (keeper._threads, keeper._leases)
    keeper.hold(lease, Store())
    assert 1 == keeper._threads and keeper.let_go(lease, "the test is over")
