"""The envelope in which an endpoint describes itself: versioned, bounded, checked before a number in it is believed.

Room `transport`; may import the ground. The digest finds damage, not malice: who may send a description is the
rendezvous' business, and a native library sees its own part of one only after all of it has been checked here.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import DescriptionInvalid, MemoryInvalid
from tensorway.memory import Region
from tensorway.transport.contract import Description

_MAGIC: Final = b"twd1"
_DIGEST: Final = 16
#: A description with 65,536 regions and a large blob is far below this.
MAX_BYTES: Final = 8 << 20
MAX_REGIONS: Final = 65_536


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    transport: str
    name: str
    incarnation: str
    regions: list[tuple[int, int, str]]
    blob: bytes


_DECODE_WIRE: Final = msgspec.msgpack.Decoder(_Wire).decode


def encode(description: Description) -> bytes:
    """A description as bytes."""
    regions = [(region.address, region.nbytes, region.device) for region in description.regions]
    wire = _Wire(description.transport, description.name, description.incarnation, regions, description.blob)
    body = msgspec.msgpack.encode(wire)
    return _MAGIC + _digest(body) + body


def decode(data: object, transport: str) -> Description:
    """A description from bytes of any origin; raises `DescriptionInvalid` unless it is one of this transport."""
    if not isinstance(data, bytes) or not data.startswith(_MAGIC):
        raise _invalid("It does not begin like one; another version of tensorway may have made it.")
    if len(data) > MAX_BYTES:
        raise _invalid(f"It has {len(data):,} bytes, and none has more than {MAX_BYTES:,}.")
    digest, body = data[len(_MAGIC) : len(_MAGIC) + _DIGEST], data[len(_MAGIC) + _DIGEST :]
    if digest != _digest(body):
        raise _invalid("It is damaged: its digest does not fit.")
    try:
        wire = _DECODE_WIRE(body)
        if len(wire.regions) > MAX_REGIONS:
            raise _invalid(f"It has {len(wire.regions):,} regions, and none has more than {MAX_REGIONS:,}.")
        regions = tuple(Region(*row) for row in wire.regions)
    except (MemoryInvalid, *UNREADABLE) as error:
        raise _invalid(f"It cannot be read: {str(error).splitlines()[0]}") from None
    if wire.transport != transport:
        raise _invalid(f"It is of a transport {wire.transport[:40]!r}, and this one is {transport!r}.")
    if not identifier(wire.name) or not identifier(wire.incarnation):
        raise _invalid("Its name or its incarnation is not one.")
    return Description(wire.transport, wire.name, wire.incarnation, regions, wire.blob)


def identifier(text: str) -> bool:
    """Whether a text may name an endpoint: printable ASCII without spaces, 1 to 128 characters."""
    return 0 < len(text) <= 128 and text.isascii() and text.isprintable() and " " not in text


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST, person=b"tensorway").digest()


def _invalid(true: str) -> DescriptionInvalid:
    return DescriptionInvalid(
        "A peer's description was given.", true, "Give the bytes that the peer's describe() returned, unchanged."
    )
