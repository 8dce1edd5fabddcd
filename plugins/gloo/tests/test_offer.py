from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_gloo.offers import construct, eplb_communicator


class TestOffer(OfferSuite):
    kind = "eplb_communicator"
    name = "gloo"
    native_modules = ("torch",)


def test_the_offer_is_probed_in_a_child_and_constructs_a_session():
    offer = eplb_communicator(HookContext(api=API, core_version="0"))

    assert construct is offer.factory
    assert "child" == offer.probe_in
    assert {"cpu", "cuda", "rocm", "xpu"} == offer.devices
