"""What reading from an engine needs once its ranks are connected: plans, prepared routes, and whom to tell.

May import the core, attrs and this package's mathematics.
"""

from __future__ import annotations

import attrs

from tensorway.transport import Peer, Route, Transport
from tensorway_kv.reads import Reads
from tensorway_kv.topology import EngineTransferInfo


@attrs.frozen(eq=False)
class Bound:
    """All that reading from an engine needs, once its ranks are connected."""

    info: EngineTransferInfo
    reads: Reads
    peers: dict[int, Peer]
    routes: dict[int, list[Route]]
    boards: dict[int, Route]
    #: For each rank that is told, how many of ours tell it.
    readers: dict[int, int]
    _layers: dict[int, Bound] = attrs.field(factory=dict)

    def layer(self, number: int, endpoint: Transport) -> Bound:
        """The same for one layer alone, whose routes are prepared when it is asked for first."""
        if number not in self._layers:
            reads = self.reads.layer(number)
            self._layers[number] = attrs.evolve(
                self, reads=reads, routes=routes_of(reads, self.peers, endpoint), layers={}
            )
        return self._layers[number]


def routes_of(reads: Reads, peers: dict[int, Peer], endpoint: Transport) -> dict[int, list[Route]]:
    """Routes for all that may be read, by the rank that has it."""
    return {
        rank: [endpoint.prepare(peers[rank], local, remote) for local, remote in reads.routes(rank)]
        for rank in reads.producers
    }
