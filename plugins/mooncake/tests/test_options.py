from __future__ import annotations

import pytest

from tensorway.errors import AddressInvalid, OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_mooncake.engine import address_of
from tensorway_mooncake.offers import transport
from tensorway_mooncake.options import MooncakeOptions

OFFER = transport(HookContext(api=API, core_version="0"))


def test_without_options_it_is_reached_from_this_machine_only():
    assert MooncakeOptions("", "") == validated(OFFER, {})
    assert "127.0.0.1" == address_of("")


def test_without_options_the_policy_of_the_deployment_says_by_what_it_is_reached(monkeypatch):
    monkeypatch.setenv("TENSORWAY_HOST", "addr:127.0.0.1")
    assert "127.0.0.1" == address_of("")
    monkeypatch.setenv("TENSORWAY_HOST", "iface:none0")
    with pytest.raises(AddressInvalid):
        address_of("")


def test_an_address_of_the_network_is_taken():
    assert MooncakeOptions("engine-1", "10.0.0.7") == validated(OFFER, {"name": "engine-1", "host": "10.0.0.7"})


@pytest.mark.parametrize("host", ["auto", "loopback", "runtime", "cidr:10.0.0.0/8", "iface:eth0", "any:auto"])
def test_a_host_policy_is_taken(host):
    assert host == validated(OFFER, {"host": host}).host


def test_containment_is_asked_for():
    assert MooncakeOptions(contained=True) == validated(OFFER, {"contained": True})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"host": "localhost"}, "a host policy, or an IPv4 address"),
        ({"host": "::1"}, "an IPv4 address"),
        ({"host": "127.0.0.1:15000"}, "an IPv4 address"),
        ({"host": "cidr:"}, "an IPv4 address"),
        ({"host": "0.0.0.0"}, "nobody can connect to"),
        ({"host": "224.0.0.1"}, "nobody can connect to"),
        ({"host": 7}, "str"),
        ({"hosts": "10.0.0.7"}, "'host'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
