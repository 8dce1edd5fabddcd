from __future__ import annotations

import pytest

from tensorway.errors import BackendUnavailable
from tensorway.hookspecs import API
from tensorway.platforms import report
from tensorway.testing import OfferSuite
from tensorway.types import HookContext, ProbeResult
from tensorway_nccl import offers
from tensorway_nccl.offers import eplb_communicator
from tensorway_nccl.options import NcclOptions


class TestOffer(OfferSuite):
    kind = "eplb_communicator"
    name = "nccl"
    native_modules = ("torch", "nvidia")


def test_it_is_for_devices_and_probed_in_a_process_of_its_own():
    offer = eplb_communicator(HookContext(api=API, core_version="0"))

    assert "child" == offer.probe_in
    assert {"cuda", "rocm"} == offer.devices


def test_without_a_device_the_factory_says_what_the_probe_says(monkeypatch):
    answer = ProbeResult.failed("no device is here", "Get one.")
    monkeypatch.setattr(offers, "probe", lambda: answer)

    with pytest.raises(BackendUnavailable) as refused:
        eplb_communicator(HookContext(api=API, core_version="0")).factory(NcclOptions(), object())

    assert ("no device is here.", "Get one.") == (refused.value.true, refused.value.to_do)


@pytest.mark.skipif(report("cuda").usable or report("rocm").usable, reason="a device is here")
def test_selection_says_so_before():
    import tensorway

    with pytest.raises(BackendUnavailable) as refused:
        tensorway.create("eplb_communicator", "nccl", {}, object())

    traces = [each.reason for each in (report("cuda"), report("rocm")) if each.evidence]
    expected = traces[0] if traces else f"{report('cuda').reason}; {report('rocm').reason}"
    assert expected in refused.value.true
