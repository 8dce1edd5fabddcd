from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_cpu.offers import offloading


class TestOffer(OfferSuite):
    kind = "offloading"
    name = "cpu"
    native_modules = ("torch",)


def test_the_offer_is_probe_only_until_there_is_an_offloading_to_construct():
    offer = offloading(HookContext(api=API, core_version="0"))

    assert offer.factory is None
    assert "host" == offer.probe_in
    assert {"cpu", "cuda", "rocm", "xpu"} == offer.devices
