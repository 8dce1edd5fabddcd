"""What has to move between two placements: computed once for all ranks, and the same on each of them.

May import the core's ground, numpy, `placement`, `policy` and `moves`. No row is touched here, and nobody is
asked: the cycle executes what a plan says.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Container, Iterable

import attrs
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tensorway.errors import ExpertLost, PlacementInvalid
from tensorway_eplb.moves import TEMPORARY, Column, Moves, moves
from tensorway_eplb.placement import Map, Placement
from tensorway_eplb.policy import Topology

__all__ = ["TEMPORARY", "LayerPlan", "PeerRows", "RankPlan", "Rows", "TransferPlan"]

#: So many lost experts are named in an error.
_NAMED = 8


@attrs.frozen
class PeerRows:
    """Rows of one layer between this rank and a peer; the same, in the same order, at both ends."""

    peer: int
    #: The slots of the sender that have them.
    slots: array[int]
    experts: array[int]


@attrs.frozen(eq=False)
class LayerPlan:
    """What one rank does in one layer: fetches and loads into staging, then copies in order, then writes."""

    layer: int
    #: What is brought from peers. No two ranks begin with the same peer if all have something for all.
    fetches: tuple[PeerRows, ...]
    #: What peers bring from here, in the order in which they begin.
    sends: tuple[PeerRows, ...]
    #: Experts that no rank holds: to be loaded from a copy.
    loads: tuple[int, ...]
    #: From slot, to slot, one after the other. `TEMPORARY` is a staging row besides those of arrivals.
    copies: tuple[tuple[int, int], ...]
    #: Which arrival, to slot; in any order, after all copies. An arrival may have several slots.
    writes: tuple[tuple[int, int], ...]
    #: One for each arrival, and one more if there is a temporary one.
    staging_rows: int
    #: Whether any slot of this rank holds another expert afterwards, or none.
    changed: bool

    @property
    def arrivals(self) -> tuple[int, ...]:
        """The experts that arrive, in the order in which `writes` counts them: fetches, then loads."""
        return (*(expert for rows in self.fetches for expert in rows.experts), *self.loads)

    @property
    def temporary(self) -> bool:
        """Whether the last staging row is for a cycle of copies."""
        return self.staging_rows > len(self.arrivals)


@attrs.frozen(eq=False)
class RankPlan:
    """One rank's part of a plan."""

    rank: int
    #: All layers of the plan in order, also those in which this rank learns a new map row and does nothing else.
    layers: tuple[LayerPlan, ...]

    @property
    def staging_rows(self) -> int:
        """The most that any layer takes here."""
        return max((layer.staging_rows for layer in self.layers), default=0)


@attrs.frozen
class Rows:
    """How many rows a plan moves, by where they come from."""

    #: A rank of another node.
    remote: int
    #: Another rank of the same node.
    same_node: int
    #: Another slot of the same rank.
    local: int
    #: A copy outside of the group.
    loaded: int


@attrs.frozen(eq=False)
class TransferPlan:
    """All that moves from one placement to another, made once. Equal questions give equal digests on all ranks."""

    old: Placement
    new: Placement
    #: The layers in which a slot changes anywhere; a plan has nothing to say about the others.
    layers: tuple[int, ...]
    rows: Rows
    moves: Moves = attrs.field(repr=False)
    digest: str

    @classmethod
    def make(
        cls,
        old: Placement,
        new: Placement,
        topology: Topology,
        *,
        copies: Container[tuple[int, int]] | NDArray[np.bool_] = (),
        excluded: Collection[int] = (),
    ) -> TransferPlan:
        """The plan from `old` to `new`.

        `copies` says which experts can be loaded if no rank holds them: pairs of layer and expert, or booleans [layers,
        experts]. `excluded` ranks send nothing, and what only they hold counts as held by nobody; what they receive
        and copy within themselves is planned all the same. Raises `PlacementInvalid` for placements of different
        shapes, and `ExpertLost` for experts that `new` has, nobody holds, and nobody has a copy of.
        """
        _check(old, new, topology, excluded)
        _check_lost(old, new, copies, excluded)
        found = moves(old, new, topology, excluded)
        layers = tuple(np.flatnonzero((old.map != new.map).any(axis=1)).tolist())
        nodes = np.asarray(topology.nodes)
        near = int((nodes[found.fetches.source] == nodes[found.fetches.target]).sum())
        local = int((found.copies.end != TEMPORARY).sum())
        rows = Rows(len(found.fetches.layer) - near, near, local, len(found.loads.layer))
        return cls(old, new, layers, rows, found, _digest(old, new, found))

    @property
    def staging(self) -> Column:
        """How many staging rows each rank needs: [layers of the model, ranks]."""
        return self.moves.arriving + self.moves.temporary

    def rank(self, me: int) -> RankPlan:
        """What one rank does."""
        fetched, sent, loads = self.moves.fetches, self.moves.fetches, self.moves.loads
        mine = np.flatnonzero(fetched.target == me)
        fetches = _by_layer(fetched.layer[mine], fetched.source[mine], fetched.slot[mine], fetched.expert[mine])
        mine = np.flatnonzero(sent.source == me)
        turn = (me - sent.target[mine]) % self.old.ranks
        mine = mine[np.lexsort((sent.expert[mine], turn, sent.layer[mine]))]
        sends = _by_layer(sent.layer[mine], sent.target[mine], sent.slot[mine], sent.expert[mine])
        mine = np.flatnonzero(loads.target == me)
        loaded = _grouped(loads.layer[mine], loads.expert[mine])
        mine = np.flatnonzero(self.moves.copies.rank == me)
        copies = _grouped(self.moves.copies.layer[mine], self.moves.copies.start[mine], self.moves.copies.end[mine])
        mine = np.flatnonzero(self.moves.writes.rank == me)
        writes = _grouped(self.moves.writes.layer[mine], self.moves.writes.arrival[mine], self.moves.writes.slot[mine])
        staging = self.staging[:, me].tolist()
        changed = (self.old.by_rank[:, me] != self.new.by_rank[:, me]).any(axis=1).tolist()
        return RankPlan(
            me,
            tuple(
                LayerPlan(
                    layer,
                    fetches.get(layer, ()),
                    sends.get(layer, ()),
                    tuple(expert for (expert,) in loaded.get(layer, ())),
                    tuple((start, end) for start, end in copies.get(layer, ())),
                    tuple((arrival, slot) for arrival, slot in writes.get(layer, ())),
                    staging[layer],
                    changed[layer],
                )
                for layer in self.layers
            ),
        )

    def bytes_per_link(self, row_bytes: ArrayLike) -> Column:
        """What goes from each rank to each: [ranks, ranks]. `row_bytes` is for all layers, or for each of the model."""
        fetches, ranks = self.moves.fetches, self.old.ranks
        lengths = np.broadcast_to(np.asarray(row_bytes, dtype=np.int64), (self.old.layers,))
        links = np.zeros(ranks * ranks, dtype=np.int64)
        np.add.at(links, fetches.source * ranks + fetches.target, lengths[fetches.layer])
        return links.reshape(ranks, ranks)

    def seconds(self, row_bytes: ArrayLike, rate: float) -> float:
        """How long the busiest rank sends or receives, if each does both at `rate` bytes a second."""
        links = self.bytes_per_link(row_bytes)
        return float(max(links.sum(axis=0).max(), links.sum(axis=1).max()) / rate)


def _by_layer(layer: Column, peer: Column, slot: Column, expert: Column) -> dict[int, tuple[PeerRows, ...]]:
    """Rows that are sorted by layer and peer, as objects."""
    if not len(layer):
        return {}
    edges = np.flatnonzero((layer[1:] != layer[:-1]) | (peer[1:] != peer[:-1])) + 1
    firsts, lasts = [0, *edges.tolist()], [*edges.tolist(), len(layer)]
    slots, experts = slot.tolist(), expert.tolist()
    found: dict[int, list[PeerRows]] = {}
    for at, who, first, last in zip(layer[firsts].tolist(), peer[firsts].tolist(), firsts, lasts, strict=True):
        rows = PeerRows(who, array("q", slots[first:last]), array("q", experts[first:last]))
        found.setdefault(at, []).append(rows)
    return {at: tuple(rows) for at, rows in found.items()}


def _grouped(layer: Column, *columns: Column) -> dict[int, list[tuple[int, ...]]]:
    found: dict[int, list[tuple[int, ...]]] = {}
    for at, *row in zip(layer.tolist(), *(column.tolist() for column in columns), strict=True):
        found.setdefault(at, []).append(tuple(row))
    return found


def _check(old: Placement, new: Placement, topology: Topology, excluded: Collection[int]) -> None:
    asked = "A plan was asked for between two placements."
    shapes = [(each.layers, each.num_logical, each.ranks, each.slots) for each in (old, new)]
    if shapes[0] != shapes[1]:
        true = "Their layers, experts, ranks and slots are {} and {}.".format(*shapes)
        to_do = "Make them alike first: `with_empty` adds ranks, `without` takes ranks away."
        raise PlacementInvalid(asked, true, to_do)
    if len(topology.nodes) != old.ranks:
        true = f"They have {old.ranks} ranks, and the topology has {len(topology.nodes)}."
        raise PlacementInvalid(asked, true, "Give the topology of the same group.")
    strange = sorted(rank for rank in excluded if not 0 <= rank < old.ranks)
    if strange:
        true = f"Ranks {strange} are to be excluded, and there are {old.ranks}."
        raise PlacementInvalid(asked, true, "Give ranks of the group: they count from 0.")


def _check_lost(
    old: Placement,
    new: Placement,
    copies: Container[tuple[int, int]] | NDArray[np.bool_],
    excluded: Collection[int],
) -> None:
    senders = old.by_rank[:, [rank for rank in range(old.ranks) if rank not in excluded]].reshape(old.layers, -1)
    missing = _present(new.map, new.num_logical) & ~_present(senders, old.num_logical)
    if isinstance(copies, np.ndarray):
        if copies.shape != missing.shape:
            raise PlacementInvalid(
                "A plan was asked for with a table of experts that have a copy.",
                f"It has shape {copies.shape}; the placements have {missing.shape} layers and experts.",
                "Give one boolean for each layer and expert.",
            )
        missing &= ~copies.astype(bool)
        lost: list[tuple[int, int]] = [(layer, expert) for layer, expert in np.argwhere(missing).tolist()]
    else:
        lost = [(layer, expert) for layer, expert in np.argwhere(missing).tolist() if (layer, expert) not in copies]
    if lost:
        named = ", ".join(f"{expert} of layer {layer}" for layer, expert in lost[:_NAMED])
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        gone = f" besides the excluded ranks {sorted(excluded)}" if excluded else ""
        raise ExpertLost(
            f"A plan was asked for to a placement of {new.ranks} ranks.",
            f"It has experts that nobody holds{gone} and of which there is no copy: {named}{more}.",
            "Give a copy to load them from, or a placement without them.",
        )


def _present(rows: Map, num_logical: int) -> NDArray[np.bool_]:
    """Which experts are in any slot: [layers, experts]."""
    found = np.zeros((len(rows), num_logical + 1), dtype=bool)  # the last column is what EMPTY, -1, points to
    found[np.arange(len(rows))[:, None], rows] = True
    return found[:, :-1]


def _digest(old: Placement, new: Placement, found: Moves) -> str:
    """Over what is to be done, as whole numbers of 32 bits, lowest byte first: the same on every machine."""
    digest = hashlib.blake2b(f"tensorway.plan/1 {old.digest} {new.digest}".encode(), digest_size=16)
    for table in (found.fetches, found.loads, found.copies, found.writes):
        columns: Iterable[Column] = (getattr(table, field.name) for field in attrs.fields(type(table)))
        for column in columns:
            digest.update(len(column).to_bytes(8, "little") + column.astype("<i4").tobytes())
    return digest.hexdigest()
