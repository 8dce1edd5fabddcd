"""What another process wrote, as what it says: read, of the version that is known here, and of a life that is ours.

May import the core's errors and msgspec. Both sides may have been installed at different times, and bytes may be any.
"""

from __future__ import annotations

from typing import Final, Protocol, TypeVar

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid

#: What was asked where a plan is read, and what to do where it cannot be.
ASKED: Final = "A step's plan was given to a mover."
TO_DO: Final = "Install one version of tensorway-kv on all ranks."


class Versioned(Protocol):
    """What says which version it is of."""

    @property
    def version(self) -> int:
        """Semantics that change have another one."""


class Plan(Versioned, Protocol):
    """What a planner says to the movers of one life of an engine."""

    @property
    def incarnation(self) -> str:
        """That life."""


_VersionedT = TypeVar("_VersionedT", bound=Versioned)
_PlanT = TypeVar("_PlanT", bound=Plan)


def decoded(
    decoder: msgspec.msgpack.Decoder[_VersionedT],
    data: bytes,
    version: int,
    asked: str,
    to_do: str,
    reader: str = "this one",
) -> _VersionedT:
    """What these bytes say; raises `DescriptionInvalid` if they say nothing, or are of another version."""
    try:
        found = decoder.decode(data)
    except UNREADABLE as error:
        raise DescriptionInvalid(asked, f"It cannot be read: {error}.", to_do) from None
    if found.version != version:
        raise DescriptionInvalid(asked, f"It is of version {found.version}; {reader} reads {version}.", to_do)
    return found


def decoded_plan(decoder: msgspec.msgpack.Decoder[_PlanT], data: bytes, version: int, incarnation: str) -> _PlanT:
    """What a step says to a mover of this life; raises `DescriptionInvalid`."""
    found = decoded(decoder, data, version, ASKED, TO_DO, "this mover")
    if found.incarnation != incarnation:
        true = f"It is from life {found.incarnation[:12]} of the engine, and the mover is of life {incarnation[:12]}."
        raise DescriptionInvalid(ASKED, true, "Start movers anew after their planner: they join the life they find.")
    return found
