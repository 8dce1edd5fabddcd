"""What two members say to each other before NCCL hears of a round.

Imports msgspec only. NCCL has neither tags nor a way back: what is put on a stream waits there for its other half, and
keeps a part of the device busy. So a round is started only when both have said that they have its rows, that nobody
has given up, and that they have a place for it:

    receiver -> sender   Ask: I want the rows of this move.            Void: not any more.
    sender -> receiver   Ready (if the receiver asks for rounds).      Refuse: it is not what I was told to send.
    lower -> higher      Propose: these pieces, in this order.
    higher -> lower      Accept: these of them; my place is taken.
    lower -> higher      Go: these of them. Both put them on their streams now; with none, nothing happens.
    both                 Done: mine are over.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

#: Cycle, layer, turn: the n-th fetch of a layer from a member in a cycle meets the n-th send there.
Key = tuple[int, int, int]
#: Of the move that a warmup makes.
WARM: Final[Key] = (-1, -1, 0)


class Item(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Pieces of one move."""

    #: Whether they go from the lower rank to the higher.
    up: bool
    key: Key
    start: int
    stop: int


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The receiver wants so many slots."""

    key: Key
    slots: int


class Void(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The receiver does not want them any more."""

    key: Key


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The sender has what the receiver wants."""

    key: Key


class Refuse(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The sender was told to send something else."""

    key: Key
    why: str


class Propose(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A round, and how the two get a communicator if they have none yet."""

    items: tuple[Item, ...]
    invitation: bytes = b""


class Accept(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What of a proposal can be."""

    items: tuple[Item, ...]


class Go(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What of it is."""

    items: tuple[Item, ...]


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A round is over here."""


Message: TypeAlias = Ask | Void | Ready | Refuse | Propose | Accept | Go | Done

ENCODER: Final = msgspec.msgpack.Encoder()
DECODER: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)
