from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_tcpstore.offers import rendezvous
from tensorway_tcpstore.store import TcpStore


class TestOffer(OfferSuite):
    kind = "rendezvous"
    name = "tcpstore"
    native_modules = ("torch",)


def test_the_offer_promises_what_the_store_can_do():
    offer = rendezvous(HookContext(api=API, core_version="0"))

    assert offer.factory is not None
    assert TcpStore.abilities == offer.capabilities
    assert "child" == offer.probe_in
