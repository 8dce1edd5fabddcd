from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_object.offers import offload_tier


class TestOffer(OfferSuite):
    kind = "offload_tier"
    name = "object"
    native_modules = ("obstore", "moto")


def test_the_offer_promises_what_a_tier_declares(library, open_tier):
    offer = offload_tier(HookContext(api=API, core_version="0"))
    capabilities = open_tier({"url": "memory://offer"}).capabilities

    assert offer.factory is not None
    assert "child" == offer.probe_in
    assert {"persistent", "shared", "deletes"} == offer.capabilities
    assert (False, False, True) == (capabilities.persistent, capabilities.shared, capabilities.deletes)
