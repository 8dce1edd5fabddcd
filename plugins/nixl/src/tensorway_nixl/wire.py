"""What two endpoints over NIXL tell each other: the fabric's part of a description, and the frame of a notification.

May import tensorway's ground and the transport's contract. Everything of a description is checked here before NIXL
sees its metadata: NIXL reads metadata of another version without a word, crashes on some that is damaged, and never
takes another of that name once it has failed to read one.
"""

from __future__ import annotations

from typing import Annotated, Final

import attrs
import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid
from tensorway.transport.contract import Description, Notification

SCHEMA: Final = 1
#: Versions that were seen to work with each other, beside equal ones. From NIXL 1.5 to 1.3 the bytes arrive and the
#: transfer never ends; from 1.3 to 1.5 the connection breaks.
_NIXL_TOGETHER: Final = frozenset({"1.4", "1.5"})
_UCX_TOGETHER: Final = frozenset({"1.22", "1.23"})
_NOTE: Final = b"twn1"
#: A message that says nothing: it is dropped where it arrives, and NIXL tells its sender if nobody is there.
HEARTBEAT: Final = b"twb1"


@attrs.frozen
class Versions:
    """What has to fit at both ends."""

    #: NIXL's; empty where its package has no metadata (AMD's builds).
    nixl: str
    #: That of the UCX which NIXL loaded.
    ucx: str

    def __str__(self) -> str:
        return f"NIXL {self.nixl or 'of unknown version'} with UCX {self.ucx or 'of unknown version'}"

    def fits(self, other: Versions) -> bool:
        """Whether endpoints of these versions were seen to work with each other."""
        pairs = ((self.nixl, other.nixl, _NIXL_TOGETHER), (self.ucx, other.ucx, _UCX_TOGETHER))
        return all(_line(a) == _line(b) or {_line(a), _line(b)} <= together for a, b, together in pairs)


#: What fits into an address, with room for what is read there.
_LAST_ADDRESS: Final = (1 << 63) - (1 << 12)


class Blob(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The fabric's part of a description."""

    schema: int
    nixl: str
    ucx: str
    #: The running kernel, so that a peer on this host is known as one.
    host: str
    #: Where the endpoint's incarnation lies in its registered memory, so that reading it proves that reading works.
    canary: Annotated[int, msgspec.Meta(gt=0, lt=_LAST_ADDRESS)]
    #: What NIXL wants to know of an agent.
    metadata: bytes


DECODE_BLOB: Final = msgspec.msgpack.Decoder(Blob).decode


class _Note(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    payload: bytes


_DECODE_NOTE: Final = msgspec.msgpack.Decoder(_Note).decode


def decode(description: Description, ours: Versions, asked: str) -> Blob:
    """The fabric's part of a description, of versions that fit ours; raises `DescriptionInvalid`."""
    try:
        blob = DECODE_BLOB(description.blob)
    except UNREADABLE as error:
        raise DescriptionInvalid(asked, f"Its NIXL part cannot be read: {error}.", "Give it unchanged.") from None
    theirs = Versions(blob.nixl, blob.ucx)
    if blob.schema != SCHEMA or not ours.fits(theirs):
        raise DescriptionInvalid(
            asked,
            f"It runs {theirs} (schema {blob.schema}), and this endpoint {ours} (schema {SCHEMA}).",
            "Install the same version of NIXL at both ends; others lose transfers without a word.",
        )
    if description.incarnation.encode() not in blob.metadata:
        raise DescriptionInvalid(asked, "Its metadata is that of another agent.", "Give it unchanged.")
    return blob


def encode(blob: Blob) -> bytes:
    """The fabric's part of a description as bytes."""
    return msgspec.msgpack.encode(blob)


def frame(name: str, payload: bytes) -> bytes:
    """A notification as NIXL carries it; NIXL itself tells which agent, and so which incarnation, sent it."""
    return _NOTE + msgspec.msgpack.encode(_Note(name, payload))


def unframe(incarnation: str, message: bytes) -> Notification | None:
    """The notification in a message; None for what is not one of ours."""
    if not message.startswith(_NOTE):
        return None
    try:
        note = _DECODE_NOTE(message[len(_NOTE) :])
    except UNREADABLE:
        return None
    return Notification(note.name, incarnation, note.payload)


def _line(version: str) -> str:
    """`1.5` of `1.5.1`."""
    return ".".join(version.split(".")[:2])
