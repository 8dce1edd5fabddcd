"""The values of the contract refuse what they cannot mean, and nobody changes them afterwards."""

from __future__ import annotations

import attrs
import pytest

from tensorway.types import Offer, ProbeResult


def offer(**fields) -> Offer:
    return Offer(**{"name": "x", "kind": "transport", "summary": "s", "probe": lambda: None} | fields)


def test_an_offer_is_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        offer().name = "y"


@pytest.mark.parametrize(
    "fields",
    [
        {"name": 3},
        {"probe": "not callable"},
        {"factory": "not callable"},
        {"options": dict},
        {"options": "Options"},
        {"devices": "cuda"},
        {"capabilities": "write"},
        {"priority": "high"},
        {"probe_in": "thread"},
    ],
)
def test_an_offer_refuses_fields_of_another_shape(fields):
    with pytest.raises((TypeError, ValueError)):
        offer(**fields)


def test_devices_and_capabilities_become_sets():
    made = offer(devices=["cpu", "cuda"], capabilities=("write",))
    assert (frozenset({"cpu", "cuda"}), frozenset({"write"})) == (made.devices, made.capabilities)


def test_facts_of_a_probe_cannot_be_changed():
    facts = {"version": "1"}
    result = ProbeResult(True, "yes", facts=facts)
    facts["version"] = "2"
    assert {"version": "1"} == dict(result.facts)
    with pytest.raises(TypeError):
        result.facts["version"] = "3"
