"""One test per hook: an offer of this kind is discovered, loaded, chosen and constructed."""

from __future__ import annotations

from tensorway.plugins.slots import SlotState


def _round(site, kind: str) -> None:
    site.good("acme", kind)
    host = site.host()
    assert ["acme"] == [slot.declaration.name for slot in host.slots(kind)]
    assert [(kind, "acme")] == [(offer.kind, offer.name) for offer in host.offers(kind)]
    backend = host.create(kind, options={"size": 2}, context="mine")
    assert (2, "mine", SlotState.CONSTRUCTED) == (backend.options.size, backend.context, host.slots(kind)[0].state)
    assert "acme" == host.decide(kind).winner.name


def test_hook_platform(site):
    _round(site, "platform")


def test_hook_transport(site):
    _round(site, "transport")


def test_hook_eplb_communicator(site):
    _round(site, "eplb_communicator")


def test_hook_placement_policy(site):
    _round(site, "placement_policy")


def test_hook_kv_connector(site):
    _round(site, "kv_connector")


def test_hook_offloading(site):
    _round(site, "offloading")


def test_hook_offload_tier(site):
    _round(site, "offload_tier")


def test_hook_eviction_policy(site):
    _round(site, "eviction_policy")


def test_hook_rendezvous(site):
    _round(site, "rendezvous")


def test_hook_observer(site):
    _round(site, "observer")
