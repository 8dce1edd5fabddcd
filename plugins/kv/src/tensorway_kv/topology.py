"""The engines that a rank can read from: what they hold, which of their ranks it reads, and who else reads those.

May import the core, msgspec and this package's mathematics. Whether an engine can be read from is answered when it is
registered, with the reason; afterwards every request can be planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import attrs
import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid, Incompatible, LayoutInvalid, PeerLost
from tensorway.kv import RankGeometry
from tensorway_kv.sources import Engine, Piece, by_pages, pieces

#: More than any engine has; beyond that a number is a mistake or an attack.
MAX_RANKS: Final = 4096
MAX_ALL_PARTS: Final = 1 << 18

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class EngineTransferInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an engine tells others, so that they can read from it."""

    engine: _Name
    #: Which life of it this is; never the same twice.
    incarnation: _Name
    #: Of all its ranks, in their order.
    ranks: Annotated[tuple[RankGeometry, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]

    def check(self) -> None:
        """Raise `LayoutInvalid` unless each rank is valid, and all have the same groups and shares of one division."""
        whose = f"engine {self.engine}"
        check_ranks(self.ranks, whose)

    def encode(self) -> bytes:
        """As others are to get it."""
        return _encoder.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> EngineTransferInfo:
        """From others; checked. Raises `DescriptionInvalid` or `LayoutInvalid`."""
        try:
            info = _decoder.decode(data)
        except UNREADABLE as error:
            asked, to_do = "An engine's geometry was given.", "Give it as the engine encoded it."
            raise DescriptionInvalid(asked, f"It does not say what one is: {error}.", to_do) from error
        info.check()
        return info


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(EngineTransferInfo)


def check_ranks(ranks: Sequence[RankGeometry], whose: str) -> None:
    """Raise `LayoutInvalid` unless these can be the ranks of one engine."""
    asked, to_do = f"The KV geometry of {whose} was given.", "Describe all ranks of one engine alike."
    if not ranks or len(ranks) > MAX_RANKS:
        raise LayoutInvalid(asked, f"It has {len(ranks)} ranks; from 1 to {MAX_RANKS} are possible.", to_do)
    if (count := sum(len(plane.parts) for rank in ranks for plane in rank.planes)) > MAX_ALL_PARTS:
        raise LayoutInvalid(asked, f"It has {count:,} parts; at most {MAX_ALL_PARTS:,} are possible.", to_do)
    for number, rank in enumerate(ranks):
        rank.check(f"rank {number} of {whose}")
        if (rank.groups, rank.share.of, rank.share.interleave) != (
            ranks[0].groups,
            ranks[0].share.of,
            ranks[0].share.interleave,
        ):
            raise LayoutInvalid(asked, f"Ranks 0 and {number} differ in groups, or in how they share tokens.", to_do)


@attrs.frozen(eq=False)
class Remote:
    """A registered engine, as one rank reads from it."""

    info: EngineTransferInfo
    #: What this rank takes, by the producer's rank.
    sources: dict[int, list[Piece]]
    #: Who reads: each of our ranks, with the producer's ranks that it reads.
    readers: dict[int, tuple[int, ...]]


class TransferTopology:
    """Which ranks of other engines one rank reads from. `ranks` are all of its own engine, for all of them choose."""

    def __init__(self, ranks: Sequence[RankGeometry], rank: int) -> None:
        check_ranks(ranks, "this engine")
        if not 0 <= rank < len(ranks):
            raise LayoutInvalid(
                f"The topology of rank {rank} was asked for.",
                f"This engine has {len(ranks)} ranks.",
                "Count them from 0.",
            )
        self.ranks, self.rank = tuple(ranks), rank
        self._own = Engine(self.ranks)
        self._remotes: dict[str, Remote] = {}

    def register_remote_engine(self, info: EngineTransferInfo) -> None:
        """Know an engine; again changes nothing, and its next incarnation takes the place of the one before.

        Raises `Incompatible` with the reason if this engine's ranks cannot read everything that they hold from it.
        """
        asked = f"Engine {info.engine} was to be read from."
        known = self._remotes.get(info.engine)
        if known is not None and known.info.incarnation == info.incarnation:
            if known.info == info:
                return
            raise Incompatible(
                asked,
                f"Its incarnation {info.incarnation[:12]} is known with another geometry.",
                "Give what has changed its memory a new incarnation.",
            )
        info.check()
        readers: dict[int, set[int]] = {rank: set() for rank in range(len(self.ranks))}
        sources: dict[int, list[Piece]] = {}
        for piece in pieces(self._own, Engine(info.ranks), asked):
            readers[piece.own.rank].add(piece.theirs.rank)
            if piece.own.rank == self.rank:
                sources.setdefault(piece.theirs.rank, []).append(piece)
        for producer, taken in sources.items():
            by_pages(self.ranks[self.rank], info.ranks[producer], taken)
        in_order = {rank: tuple(sorted(producers)) for rank, producers in readers.items()}
        self._remotes[info.engine] = Remote(info, dict(sorted(sources.items())), in_order)

    def forget_remote_engine(self, engine: str) -> None:
        """Let go of an engine; also of one that is not known."""
        self._remotes.pop(engine, None)

    def remote(self, engine: str) -> Remote:
        """A registered engine, with what this rank takes from it."""
        if engine not in self._remotes:
            true = f"No such engine is registered; there is: {', '.join(sorted(self._remotes)) or 'none'}."
            raise PeerLost(f"Engine {engine} was asked for.", true, "Register it when it has said what it holds.")
        return self._remotes[engine]

    def get_engine_info(self, engine: str) -> EngineTransferInfo:
        """What an engine said."""
        return self.remote(engine).info

    def source_ranks(self, engine: str, rank: int | None = None) -> tuple[int, ...]:
        """The producer's ranks that this rank, or another of ours, reads from."""
        return self.remote(engine).readers[self.rank if rank is None else rank]

    def handshake_target_ranks(self, engine: str) -> tuple[int, ...]:
        """Whom this rank must reach: whom it reads from, and its share of those that nobody reads from.

        They, too, keep a request's blocks until they are told that nobody needs them.
        """
        remote = self.remote(engine)
        own, theirs = len(self.ranks), len(remote.info.ranks)
        read = {producer for producers in remote.readers.values() for producer in producers}
        told = {rank for rank in set(range(theirs)) - read if rank * own // theirs == self.rank}
        return tuple(sorted(told.union(remote.readers[self.rank])))

    def consumers(self, engine: str, producer: int) -> int:
        """How many of our ranks tell a rank of the producer when they are done: all that read it, at least one."""
        return max(1, sum(producer in producers for producers in self.remote(engine).readers.values()))
