from __future__ import annotations

from tensorway.testing import OfferSuite


class TestOffer(OfferSuite):
    kind = "transport"
    name = "mooncake"
    native_modules = ("mooncake",)


def test_the_offer_says_what_it_constructs():
    from tensorway.hookspecs import API
    from tensorway.types import HookContext
    from tensorway_mooncake.offers import transport

    offer = transport(HookContext(api=API, core_version="0"))

    assert offer.factory is not None
    assert {"read", "write", "notify"} == offer.capabilities
    assert offer.probe_in == "child"
    assert {"cpu"} == offer.devices
