"""What the planner of `several` tells its movers in `Step.plan`, and what they tell it of a child that has ended.

May import the core's errors and msgspec. Both sides are one engine, but processes of their own: so it has a version,
and is read as carefully as what comes from elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from tensorway.errors import DescriptionInvalid
from tensorway_kv.several.options import MOST_CHILDREN

VERSION: Final = 1
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Begun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that a child has been given blocks for, and what the child calls it."""

    request: str
    child: _Name
    inner: str


class Orders(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All of one step."""

    version: int
    #: The plan of each child that has one.
    plans: Annotated[dict[_Name, bytes], msgspec.Meta(max_length=MOST_CHILDREN)] = {}
    begun: tuple[Begun, ...] = ()
    #: Children that are out of use, and are to be closed.
    ends: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MOST_CHILDREN)] = ()

    def __bool__(self) -> bool:
        return bool(self.plans or self.begun or self.ends)


class Ended(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A child is closed beside this rank's memory: nothing of it touches a page any more."""

    version: int
    child: _Name


_Read = TypeVar("_Read", Orders, Ended)
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_ORDERS: Final = msgspec.msgpack.Decoder(Orders)
_ENDED: Final = msgspec.msgpack.Decoder(Ended)


def encode(what: Orders | Ended) -> bytes:
    """As `Step.plan` or `Result.proof` carries it; nothing for nothing."""
    return _ENCODE(what) if isinstance(what, Ended) or what else b""


def decode(plan: bytes) -> Orders:
    """What a step says; raises `DescriptionInvalid`."""
    return _read(plan, _ORDERS, "A step's plan was given to a mover.") if plan else Orders(VERSION)


def decode_ended(proof: bytes) -> Ended:
    """Which child has ended; raises `DescriptionInvalid`."""
    return _read(proof, _ENDED, "A mover said that a child has ended.")


def _read(data: bytes, decoder: msgspec.msgpack.Decoder[_Read], asked: str) -> _Read:
    to_do = "Install one version of tensorway-kv on all ranks."
    try:
        found = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DescriptionInvalid(asked, f"It cannot be read: {error}.", to_do) from None
    if found.version != VERSION:
        raise DescriptionInvalid(asked, f"It is of version {found.version}; this one reads {VERSION}.", to_do)
    return found
