"""What travels between the clients of `direct` and its service: typed frames, and the keys that the secret makes.

Room `rendezvous`; may import the ground and its own room. Frames go through CurveZMQ: each connection is encrypted with
keys of its own, and the service's public key is derived from the secret instead of published. So whoever does not know
the secret cannot say hello, and the service has nothing to ask them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import RecordRefused
from tensorway.rendezvous.contract import MAX_VALUE

if TYPE_CHECKING:
    import zmq

#: A value, and room for keys and numbers around it.
MAX_FRAME: Final = MAX_VALUE + (64 << 10)
#: The service speaks to clients of the same number only.
PROTOCOL: Final = 2

_Text = Annotated[str, msgspec.Meta(max_length=512)]


class Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One call; the fields that a call has no use for keep their defaults."""

    protocol: int
    number: int
    call: Annotated[str, msgspec.Meta(max_length=16)]
    key: _Text = ""
    value: bytes = b""
    lease: _Text = ""
    expected: int | None = None
    ttl: float = 0.0


class Row(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A record."""

    key: str
    value: bytes
    revision: int
    lease: str


class Answer(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag="answer"):
    """What the service says to one request; `refused` is the three lines of an error, and `error` its class."""

    number: int
    #: Which life of the service says it: leases and watches of another are gone.
    incarnation: str
    revision: int = 0
    text: str = ""
    rows: list[Row] = []
    error: str = ""
    refused: tuple[str, str, str] = ("", "", "")


class Told(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag="told"):
    """In front of changes for one watch; `order` counts these without a gap, unless some were lost on the way."""

    watch: int
    order: int


class Change(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An event. All of one turn are one frame, the second after `Told`, and the same one for all who watch a prefix."""

    kind: str
    key: str
    #: The service's, which each change makes one more: a watch drops what was before it.
    revision: int
    row: Row | None = None


class Status(msgspec.Struct, forbid_unknown_fields=True):
    """What a service says about itself, and about the leases of records below a prefix."""

    incarnation: str
    #: Since it began.
    seconds: float
    #: What its process has in memory, and what the values of all records have.
    memory_bytes: int
    record_bytes: int
    records: int
    held_leases: int
    watches: int
    #: How often each call was made.
    calls: dict[str, int]
    #: Changes that were sent, and in how many frames.
    changes: int
    changes_frames: int
    #: Lease -> the seconds for which it lasts if nobody keeps it.
    leases: dict[str, float]


encode: Final = msgspec.msgpack.Encoder().encode
decode_request: Final = msgspec.msgpack.Decoder(Request).decode
decode_reply: Final = msgspec.msgpack.Decoder(Answer | Told).decode
decode_changes: Final = msgspec.msgpack.Decoder(list[Change]).decode
encode_status: Final = msgspec.json.Encoder().encode
_DECODE_STATUS: Final = msgspec.json.Decoder(Status).decode


def status_of(text: str) -> Status:
    """What a service said about itself; raises `RecordRefused` if that is no status."""
    try:
        return _DECODE_STATUS(text)
    except UNREADABLE as error:
        raise RecordRefused(
            "The rendezvous was asked how it is.",
            f"What it says is no status: {error}.",
            "Install one version of tensorway in the whole deployment.",
        ) from error


def service_keys(secret: str) -> tuple[bytes, bytes]:
    """The service's public and secret key; both stay among those who know the secret."""
    import zmq
    from zmq.utils import z85

    raw = hashlib.blake2b(secret.encode(), digest_size=32, person=b"tensorway direct").digest()
    private = z85.encode(raw)
    return zmq.curve_public(private), private


def bounded(socket: zmq.Socket[Any]) -> None:
    """What both sides' sockets have in common: nothing lingers, nothing grows."""
    import zmq

    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
