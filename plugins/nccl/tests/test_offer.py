from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_nccl.offers import eplb_communicator


class TestOffer(OfferSuite):
    kind = "eplb_communicator"
    name = "nccl"
    native_modules = ("torch", "nvidia")


def test_the_offer_is_probe_only_until_there_is_a_communicator_to_construct():
    offer = eplb_communicator(HookContext(api=API, core_version="0"))

    assert offer.factory is None
    assert "child" == offer.probe_in
    assert {"cuda", "rocm"} == offer.devices
