"""What a keeper says of the leases that it holds."""

from __future__ import annotations

import time

from tensorway.metrics import total
from tensorway.rendezvous.leases import Keeper, Lease


class Store:
    """Keeps leases until it is told to forget them."""

    name = "scripted"
    knows = True

    def keep(self, name, deadline):
        return self.knows


def until(wanted, seconds=30.0):
    end = time.monotonic() + seconds
    while not wanted() and time.monotonic() < end:
        time.sleep(0.005)
    assert wanted()


def test_leases_that_are_held_that_end_soonest_and_that_were_lost():
    keeper, store = Keeper(), Store()
    assert [] == keeper.samples()
    short, long = (Lease(name, ttl, time.monotonic()) for name, ttl in (("a", 0.3), ("b", 60.0)))
    for lease in (short, long):
        keeper.hold(lease, store)
    samples = keeper.samples()
    assert 2 == total(samples, "rendezvous_held_leases", store="scripted")
    assert 0 < total(samples, "rendezvous_lease_seconds", store="scripted") <= 0.3
    assert 0 == total(samples, "rendezvous_lost_leases_total")
    store.knows = False
    until(lambda: short.lost)
    until(lambda: total(keeper.samples(), "rendezvous_lost_leases_total", store="scripted"))
    samples = keeper.samples()
    assert 1 == total(samples, "rendezvous_lost_leases_total", store="scripted")
    assert not long.lost or 2 == total(samples, "rendezvous_lost_leases_total")
    assert keeper.let_go(long, "the test is over") and 0 == total(keeper.samples(), "rendezvous_held_leases")
    assert 1 == total(keeper.samples(), "rendezvous_lost_leases_total"), "who lets go has lost nothing"
