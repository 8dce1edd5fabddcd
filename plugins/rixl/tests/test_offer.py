from __future__ import annotations

import re

from tensorway.testing import OfferSuite


class TestOffer(OfferSuite):
    kind = "transport"
    name = "rixl"
    native_modules = ("nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm", "rixl", "rixl_client")


def test_the_offer_says_what_it_constructs():
    from tensorway.hookspecs import API
    from tensorway.types import HookContext
    from tensorway_nixl.options import NixlOptions
    from tensorway_rixl.offers import transport

    offer = transport(HookContext(api=API, core_version="0"))

    assert offer.factory is not None
    assert {"read", "write", "notify"} == offer.capabilities
    assert offer.probe_in == "child"
    assert {"cpu", "rocm"} == offer.devices
    assert NixlOptions is offer.options


def test_no_dependency_and_no_extra_names_the_rixl_of_the_public_index():
    from importlib.metadata import requires

    names = [re.split(r"[^\w-]", requirement)[0] for requirement in requires("tensorway-rixl") or ()]

    assert ["attrs", "tensorway", "tensorway-nixl"] == sorted(names)
