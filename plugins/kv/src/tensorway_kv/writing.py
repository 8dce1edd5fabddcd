"""The side of a link that writes: what our rank has of a request, into the landing memory of another engine's ranks.

May import the core and this package's links and mathematics. What is written is what the other rank would read, so the
plan is made as it would make it, and both sides are swapped.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

import attrs

from tensorway.errors import Incompatible
from tensorway.kv import Group, RankGeometry
from tensorway.transport import Peer, Route, Transfer, Transport
from tensorway_kv.links import Side
from tensorway_kv.meeting import Ground, RankRecord
from tensorway_kv.reads import Held, Reads
from tensorway_kv.topology import EngineTransferInfo, TransferTopology


@attrs.frozen(eq=False)
class Way:
    """From our rank's pages to the landing memory of one rank."""

    peer: Peer
    #: How that rank would read from ours alone.
    reads: Reads
    #: The layers that it takes from us token by token, and its cache groups.
    layers: frozenset[int]
    groups: tuple[Group, ...]
    _rank: int
    _endpoint: Transport
    _routes: list[Route]
    _alone: dict[int, Way] = attrs.field(factory=dict)

    @classmethod
    def of(cls, peer: Peer, topology: TransferTopology, rank: int, engine: str, endpoint: Transport) -> Way:
        """To the topology's own rank."""
        reads = Reads(topology, engine, {rank})
        taken = topology.remote(engine).sources[rank]
        layers = frozenset(piece.own.part.layer for piece in taken if piece.own.part.tokens)
        groups = topology.ranks[0].groups
        return cls(peer, reads, layers, groups, rank, endpoint, _swapped(endpoint, peer, reads, rank))

    def layer(self, number: int) -> Way:
        """The same for one layer alone; its routes are prepared when it is asked for first."""
        if number not in self._alone:
            reads = self.reads.layer(number)
            routes = _swapped(self._endpoint, self.peer, reads, self._rank)
            self._alone[number] = attrs.evolve(self, reads=reads, routes=routes, alone={})
        return self._alone[number]

    def write(
        self, own: Held, landing: Held, start: int, stop: int, until: float, *, states: bool, clip: bool = False
    ) -> list[Transfer]:
        """Begin to write these tokens; with `clip`, of lists that begin later what they have."""
        plan = self.reads.plan(landing, own, start, stop, states=states, clip=clip)
        left = max(1e-3, until - time.monotonic())
        transfers = []
        for batch in plan.get(self._rank, []):
            here, there = (array("q", ids.astype("q").tobytes()) for ids in (batch.remote, batch.local))
            transfers.append(self._endpoint.write(self._routes[batch.route], here, there, deadline=left))
        return transfers


def _swapped(endpoint: Transport, peer: Peer, reads: Reads, rank: int) -> list[Route]:
    tables = reads.routes(rank) if rank in reads.producers else ()
    return [endpoint.prepare(peer, ours, landing) for landing, ours in tables]


@attrs.frozen(eq=False)
class Written:
    """All that writing to an engine needs, once its ranks are connected."""

    peers: dict[int, Peer]
    #: By its rank.
    ways: dict[int, Way]


class Writer(Side[Written]):
    """Who writes."""

    def __init__(
        self, ground: Ground, endpoint: Transport, ranks: Sequence[RankGeometry], me: tuple[str, str], rank: int
    ) -> None:
        super().__init__(ground, endpoint, me, rank)
        self.groups = ranks[rank].groups
        self._info = EngineTransferInfo(*me, tuple(ranks))

    def targets(self, engine: str, incarnation: str, records: Sequence[RankRecord]) -> Sequence[int]:
        """The ranks that take anything of ours."""
        remote = self._topology(engine, records, 0).remote(self.engine)
        return [reader for reader, producers in remote.readers.items() if self.rank in producers]

    def bind(self, engine: str, incarnation: str, records: Sequence[RankRecord], peers: dict[int, Peer]) -> Written:
        """Routes to all of them."""
        ways = {
            reader: Way.of(peer, self._topology(engine, records, reader), self.rank, self.engine, self.endpoint)
            for reader, peer in peers.items()
        }
        return Written(peers, ways)

    def _topology(self, engine: str, records: Sequence[RankRecord], reader: int) -> TransferTopology:
        """Who of them would read what of us."""
        topology = TransferTopology(self._landings(engine, records), reader)
        topology.register_remote_engine(self._info)
        return topology

    def _landings(self, engine: str, records: Sequence[RankRecord]) -> list[RankGeometry]:
        """Where they are written to."""
        landings = [record.landing for record in records if record.landing is not None]
        if len(landings) < len(records):
            asked, true = f"Blocks were to be pushed to engine {engine}.", "It has no staging memory."
            raise Incompatible(asked, true, "Give it `staging_blocks`, or let it read them.")
        return landings


class Answerer(Writer):
    """Who writes what it is asked to, to where who asks would read it to."""

    def _landings(self, engine: str, records: Sequence[RankRecord]) -> list[RankGeometry]:
        return [record.geometry for record in records]
