from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_gloo.offers import eplb_communicator


class TestOffer(OfferSuite):
    kind = "eplb_communicator"
    name = "gloo"
    native_modules = ("torch",)


def test_the_offer_is_probe_only_until_there_is_a_communicator_to_construct():
    offer = eplb_communicator(HookContext(api=API, core_version="0"))

    assert offer.factory is None
    assert "child" == offer.probe_in
    assert {"cpu", "cuda", "rocm", "xpu"} == offer.devices
