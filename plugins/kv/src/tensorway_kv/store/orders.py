"""What a planner of `shared-store` tells its movers in `Step.plan`: which blocks to load, to save, and what to end.

May import the core's ground, msgspec and this dist's decoding. Both sides are one engine, but they are processes of
their own, and may have been installed at different times: so it has a version, and is read as carefully as what comes
from elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from tensorway.errors import DescriptionInvalid
from tensorway_kv.decoding import ASKED, TO_DO, decoded_plan
from tensorway_kv.store.sections import Digest

VERSION: Final = 1

Ids = tuple[tuple[int, ...], ...]
_Name = Annotated[bytes, msgspec.Meta(min_length=20, max_length=20)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Load(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Load the tokens from `start` to before `stop`."""

    request: str
    seconds: float
    start: _Count
    stop: _Count
    #: Of the block in which `start` lies, and those that follow.
    names: tuple[_Name, ...]
    #: The layouts that files of these blocks have, and for each block and group which of them; -1 for none.
    layouts: tuple[Digest, ...]
    which: tuple[tuple[int, ...], ...]
    blocks: Ids


class Save(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Save full blocks of a request that ended, unless they are stored."""

    request: str
    seconds: float
    #: How many tokens its blocks hold.
    tokens: _Count
    #: The first block that is to be saved, and its name and those that follow.
    first: _Count
    names: tuple[_Name, ...]
    blocks: Ids


class Orders(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All of one step, carried out in this order."""

    version: int
    #: The life of the engine whose planner says it.
    incarnation: str
    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
    cancels: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.loads or self.saves or self.cancels)


_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODER: Final = msgspec.msgpack.Decoder(Orders)


def encode(orders: Orders) -> bytes:
    """As `Step.plan` carries it; nothing for nothing."""
    return _ENCODE(orders) if orders else b""


def decode(plan: bytes, incarnation: str) -> Orders:
    """What a step says to a mover of this life; raises `DescriptionInvalid`."""
    if not plan:
        return Orders(VERSION, incarnation)
    orders = decoded_plan(_DECODER, plan, VERSION, incarnation)
    for load in orders.loads:
        counts = [len(row) for row in load.which]
        if len(counts) != len(load.names) or any(one >= len(load.layouts) for row in load.which for one in row):
            raise DescriptionInvalid(ASKED, "It names layouts that it does not have.", TO_DO)
    return orders
