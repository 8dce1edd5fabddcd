"""What the planner of `several` tells its movers in `Step.plan`, and what they tell it that no child says.

May import the core's errors and msgspec. Both sides are one engine, but processes of their own: so it has a version,
and is read as carefully as what comes from elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec

from tensorway_kv.decoding import ASKED, TO_DO, decoded
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


class Said(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a mover says for itself."""

    version: int
    #: `ended`: a child is closed beside this rank's memory, and nothing of it touches a page any more. `computed`: the
    #: engine has begun to compute with a request's layers before all of it was here.
    what: Literal["ended", "computed"]
    #: Of the child, or of the request.
    name: str


_Read = TypeVar("_Read", Orders, Said)
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_ORDERS: Final = msgspec.msgpack.Decoder(Orders)
_SAID: Final = msgspec.msgpack.Decoder(Said)


def encode(what: Orders | Said) -> bytes:
    """As `Step.plan` or `Result.proof` carries it; nothing for nothing."""
    return _ENCODE(what) if isinstance(what, Said) or what else b""


def decode(plan: bytes) -> Orders:
    """What a step says; raises `DescriptionInvalid`."""
    return _read(plan, _ORDERS, ASKED) if plan else Orders(VERSION)


def decode_said(proof: bytes) -> Said:
    """What a mover says for itself; raises `DescriptionInvalid`."""
    return _read(proof, _SAID, "A mover of several connectors said something for itself.")


def _read(data: bytes, decoder: msgspec.msgpack.Decoder[_Read], asked: str) -> _Read:
    return decoded(decoder, data, VERSION, asked, TO_DO)
