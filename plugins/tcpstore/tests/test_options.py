from __future__ import annotations

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.hookspecs import API
from tensorway.plugins.options import validated
from tensorway.types import HookContext
from tensorway_tcpstore.offers import rendezvous
from tensorway_tcpstore.options import TcpStoreOptions

OFFER = rendezvous(HookContext(api=API, core_version="0"))


@pytest.mark.parametrize("address", ["", "host:29500", "10.0.0.7:29500", "[fd00::1]:29500"])
def test_an_address_is_host_and_port(address):
    assert TcpStoreOptions(address) == validated(OFFER, {"address": address})


def test_the_secret_is_not_in_reports():
    assert "hidden words" not in repr(TcpStoreOptions(secret="hidden words"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"address": "host"}, "is not like host:29500"),
        ({"address": "host:x"}, "is not like host:29500"),
        ({"address": "tcp://host:1"}, "is not like host:29500"),
        ({"address": "host:1/a"}, "is not like host:29500"),
        ({"port": 65_536}, "port"),
        ({"connect_s": -1}, "connect_s"),
        ({"adress": "host:1"}, "'address'"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(given, says):
    with pytest.raises(OptionsInvalid) as refused:
        validated(OFFER, given)

    assert says in str(refused.value)
