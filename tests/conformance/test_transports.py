"""The kit's suite for transports, over every transport that is installed here, has a factory and can work here."""

from __future__ import annotations

import pytest

from tensorway.hookspecs import API
from tensorway.plugins import Host
from tensorway.plugins.scan import scan
from tensorway.settings import Settings
from tensorway.testing import TransportSuite


def usable() -> dict[str, str]:
    """Every installed transport, and why it cannot be used here; empty if it can."""
    host = Host(scan(), Settings(probe_timeout=60.0))
    found = {}
    for slot in host.slots("transport"):
        offer = slot.load(host.context, 60.0)
        if offer is not None and offer.factory is not None:
            slot.probe(60.0)
        constructs = offer is None or offer.factory is not None
        reason = slot.record.reason if slot.record else "" if constructs else "it constructs nothing"
        found[slot.declaration.name] = reason
    return found


TRANSPORTS = usable()
WORKING = [name for name, reason in TRANSPORTS.items() if not reason]


@pytest.mark.parametrize("backend", WORKING)
class TestEveryTransport(TransportSuite):
    """One class, parametrized: a transport that can be used here and fails its suite fails here."""

    @pytest.fixture(autouse=True)
    def _which(self, backend: str) -> None:
        self.name = backend


def test_what_is_left_out_is_left_out_for_a_reason_of_this_machine():
    assert "local" in WORKING
    assert {"mooncake", "nixl", "rixl"} <= set(TRANSPORTS)
    assert API == 1
