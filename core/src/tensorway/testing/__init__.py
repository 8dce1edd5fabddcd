"""For plugin authors: suites that a backend must pass, and fixtures that keep a test to itself.

Room `testing`; may import everything but `cli`. Subclass a suite and say what it is about; a test that is replaced
without a reason makes the suite itself fail. Names are loaded when they are first read, because pytest imports this
package in every test run on the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "ConnectorSuite",
    "EvictionPolicySuite",
    "Faults",
    "FaultyFabric",
    "Lab",
    "OfferSuite",
    "OffloadingManagerSuite",
    "OffloadingWorkerSuite",
    "PeerProcess",
    "RendezvousSuite",
    "ServedRendezvousSuite",
    "Server",
    "SessionSuite",
    "TierSuite",
    "TransportSuite",
    "launching",
    "probe_elsewhere",
]

_HOMES = {
    "ConnectorSuite": "connectors",
    "EvictionPolicySuite": "offload_policies",
    "Faults": "faults",
    "FaultyFabric": "faults",
    "Lab": "netlab",
    "OfferSuite": "offers",
    "OffloadingManagerSuite": "offload_managers",
    "OffloadingWorkerSuite": "offload_workers",
    "PeerProcess": "peer",
    "RendezvousSuite": "rendezvous",
    "ServedRendezvousSuite": "rendezvous",
    "Server": "servers",
    "SessionSuite": "sessions",
    "TierSuite": "offload_tiers",
    "TransportSuite": "transports",
    "launching": "servers",
    "probe_elsewhere": "elsewhere",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"tensorway.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from tensorway.testing.connectors import ConnectorSuite
    from tensorway.testing.elsewhere import probe_elsewhere
    from tensorway.testing.faults import Faults, FaultyFabric
    from tensorway.testing.netlab import Lab
    from tensorway.testing.offers import OfferSuite
    from tensorway.testing.offload_managers import OffloadingManagerSuite
    from tensorway.testing.offload_policies import EvictionPolicySuite
    from tensorway.testing.offload_tiers import TierSuite
    from tensorway.testing.offload_workers import OffloadingWorkerSuite
    from tensorway.testing.peer import PeerProcess
    from tensorway.testing.rendezvous import RendezvousSuite, ServedRendezvousSuite
    from tensorway.testing.servers import Server, launching
    from tensorway.testing.sessions import SessionSuite
    from tensorway.testing.transports import TransportSuite
