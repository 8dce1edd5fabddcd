"""What a planner tells its movers in `Step.plan`: words to write, blocks to fetch, to await and to send, what to end.

May import the core's ground and msgspec. Both sides are one engine, but they are processes of their own, and may have
been installed at different times: so it has a version, and is read as carefully as what comes from elsewhere.
"""

from __future__ import annotations

from typing import Final

import msgspec

from tensorway_kv.decoding import decoded_plan

VERSION: Final = 1

Ids = tuple[tuple[int, ...], ...]


class Mark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A word to be written beside blocks."""

    word: int
    blocks: Ids


class Want(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that another engine keeps blocks for: reach that engine, and tell it that they are still wanted."""

    request: str
    engine: str
    incarnation: str
    #: What the producer calls the request, and its lease.
    theirs: str
    epoch: int
    #: For how long, and how often the producer is told.
    seconds: float
    beat: float


class Fetch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Read the tokens from `start` to before `stop`, which may be none; then tell the producer."""

    want: Want
    #: Tokens that the producer's blocks hold.
    tokens: int
    their_blocks: Ids
    blocks: Ids
    start: int
    stop: int
    #: If `blocks` are of staging memory, the pages to which they are copied once they are known to be whole.
    pages: Ids | None = None
    #: Whether the blocks may not be filled yet: nothing is read before the words beside them say that they are.
    later: bool = False


class Copy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Copy what pages hold of a request to staging memory, from where others read it under a lease; and say so."""

    request: str
    epoch: int
    tokens: int
    pages: Ids
    staged: Ids


class Await(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Let the producer write the same tokens to landing memory, and copy them to the pages from there.

    Who cannot ask for that reads them, if the producer's blocks are known.
    """

    fetch: Fetch
    #: Ids of blocks of landing memory, for each cache group: of the last tokens up to `stop`.
    landing: Ids


class Target(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a rank of a consumer wants which tokens, and until when; known by its request, epoch, life and rank."""

    engine: str
    incarnation: str
    reader: int
    request: str
    epoch: int
    landing: Ids
    first: int
    stop: int
    seconds: float


class Push(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Write what this rank of ours has of a request to a rank of a consumer; what it is, `Send` says."""

    rank: int
    target: Target


class Send(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tokens from `first` to before `stop` are, or will be, in these blocks, for whoever is to have them."""

    request: str
    blocks: Ids
    first: int
    stop: int
    #: The epochs by which consumers know the lease.
    names: tuple[int, ...]
    #: What is beside the blocks while they are kept; 0 while the tokens are being computed.
    word: int = 0


class Refuse(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Write nothing more to a rank of a consumer, and tell it so once that is true."""

    #: Of ours; all of them if negative.
    rank: int
    engine: str
    incarnation: str
    reader: int
    request: str
    epoch: int
    cause: str


class Orders(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All of one step, carried out in this order."""

    version: int
    #: The life of the engine whose planner says it.
    incarnation: str
    marks: tuple[Mark, ...] = ()
    wants: tuple[Want, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    cancels: tuple[str, ...] = ()
    awaits: tuple[Await, ...] = ()
    pushes: tuple[Push, ...] = ()
    sends: tuple[Send, ...] = ()
    refusals: tuple[Refuse, ...] = ()
    copies: tuple[Copy, ...] = ()

    def __bool__(self) -> bool:
        what = self.marks or self.wants or self.fetches or self.cancels or self.awaits
        return bool(what or self.pushes or self.sends or self.refusals or self.copies)


_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODER: Final = msgspec.msgpack.Decoder(Orders)


def encode(orders: Orders) -> bytes:
    """As `Step.plan` carries it; nothing for nothing."""
    return _ENCODE(orders) if orders else b""


def decode(plan: bytes, incarnation: str) -> Orders:
    """What a step says to a mover of this life; raises `DescriptionInvalid`."""
    if not plan:
        return Orders(VERSION, incarnation)
    return decoded_plan(_DECODER, plan, VERSION, incarnation)
