"""What peers say to each other, and what is made of bytes that may be anything.

May import msgspec and the core's offload room. Nobody's memory is in a message: a row is a number, and what a number
can mean is checked by who uses it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from tensorway.decoding import UNREADABLE

VERSION: Final = 1
#: Keys of one message: with the longest hash that is less than what every transport takes.
MOST_KEYS: Final = 512
#: Bytes of a message that a key takes at most.
KEY_BYTES: Final = 80
#: Seconds for which anything can be lent, whatever is asked.
LONGEST: Final = 3600.0

_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Key = Annotated[bytes, msgspec.Meta(min_length=16, max_length=76)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST)]
_Keys = Annotated[tuple[_Key, ...], msgspec.Meta(min_length=1, max_length=MOST_KEYS)]
_Rows = Annotated[tuple[Annotated[int, msgspec.Meta(ge=-1, le=(1 << 31) - 1)], ...], msgspec.Meta(max_length=MOST_KEYS)]
_Sums = Annotated[tuple[Annotated[bytes, msgspec.Meta(max_length=8)], ...], msgspec.Meta(max_length=MOST_KEYS)]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """Which of these have you? Lend those for so long; for no time at all if it is only to be known."""

    version: int
    number: _Number
    keys: _Keys
    seconds: _Seconds


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """In which row each is, -1 for one that is not there, and the checksum of what lies there."""

    version: int
    number: _Number
    rows: _Rows
    sums: _Sums
    #: For how long they are lent, from when they were asked for.
    seconds: _Seconds


class Returned(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """Nobody reads what was lent under this number any more."""

    version: int
    number: _Number


Message = Ask | Answer | Returned
_DECODER: Final = msgspec.msgpack.Decoder(Message)
encode: Final = msgspec.msgpack.Encoder().encode


def decode(payload: bytes) -> Message | None:
    """A message, or None of what is none."""
    try:
        message = _DECODER.decode(payload)
    except UNREADABLE:
        return None
    return message if message.version == VERSION else None
