from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_ray.offers import rendezvous
from tensorway_ray.store import RayStore


class TestOffer(OfferSuite):
    kind = "rendezvous"
    name = "ray"
    native_modules = ("ray",)


def test_the_offer_promises_what_the_store_can_do():
    offer = rendezvous(HookContext(api=API, core_version="0"))

    assert offer.factory is not None
    assert RayStore.abilities == offer.capabilities
    assert "child" == offer.probe_in
